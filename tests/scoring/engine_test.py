import subprocess
import sys

from agfsync_jax.scoring import engine


def test_decoding_runs_ahead():
    made = []

    def work():
        for number in range(6):
            made.append(number)
            yield number

    ahead = engine._ahead(work())
    assert next(ahead) == 0
    assert list(ahead) == [1, 2, 3, 4, 5] and made == [0, 1, 2, 3, 4, 5]


def test_tfds_is_imported_before_the_thread_starts():
    """While it is, the imports of other threads fail."""
    code = (
        "import sys\n"
        "from agfsync_jax.scoring import engine\n"
        "shards = engine.score_shards({}, [], {}, {}, batch_size=1, expected=len)\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "assert list(shards) == []\n"
        "assert 'tensorflow_datasets' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
