import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agfsync_jax.data import candidates, records
from agfsync_jax.data.candidates import Shard, largest_batch
from agfsync_jax.data.images import decode_png


def make(tmp_path, sizes=(3, 2, 4)):
    shards = [
        candidates.Shard(
            tmp_path / f"{index}.tfrecord",
            [{"prompt_id": f"p{index}", "candidate": c, "seed": 10 * index + c} for c in range(n)],
        )
        for index, n in enumerate(sizes)
    ]
    total = sum(sizes)
    images = np.random.default_rng(0).integers(0, 256, (total, 8, 8, 3), np.uint8)
    latents = np.arange(total * 4, dtype=np.float16).reshape(total, 2, 2, 1)
    return shards, latents, images


def batches(latents, images, size, stop=None):
    for start in range(0, len(images), size):
        if stop is not None and start >= stop:
            raise KeyboardInterrupt
        rows = slice(start, min(start + size, len(images)))
        yield rows, latents[rows], images[rows]


def test_the_plan_of_a_folder(tmp_path):
    shards = candidates.plan_shards(
        tmp_path,
        ["a", "b", "c"],
        prompts_per_shard=2,
        num_candidates=2,
        seed_of=lambda prompt_id, candidate: 10 * ord(prompt_id) + candidate,
    )
    assert [shard.path.name for shard in shards] == [
        "00000-of-00002.tfrecord",
        "00001-of-00002.tfrecord",
    ]
    keys = [[(row["prompt_id"], row["candidate"]) for row in shard.rows] for shard in shards]
    assert keys == [[("a", 0), ("a", 1), ("b", 0), ("b", 1)], [("c", 0), ("c", 1)]]
    assert shards[1].rows[1]["seed"] == 991


@pytest.mark.parametrize("size", [1, 4, 100])
def test_batches_of_any_size_fill_the_shards(tmp_path, size):
    shards, latents, images = make(tmp_path)
    counts = list(candidates.write_candidates(batches(latents, images, size), shards))
    assert sum(counts) == 9 and max(counts) <= size
    read = [
        row for path, _ in shards for row in records.read_shard(path, records.CANDIDATE_FEATURES)
    ]
    assert [row["seed"] for row in read] == [0, 1, 2, 10, 11, 20, 21, 22, 23]
    for row, latent, image in zip(read, latents, images, strict=True):
        np.testing.assert_array_equal(row["latents"], latent)
        np.testing.assert_array_equal(decode_png(row["image"]), image)


def test_a_stop_keeps_whole_shards_only(tmp_path):
    shards, latents, images = make(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        list(candidates.write_candidates(batches(latents, images, 2, stop=6), shards))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tfrecord", "1.tfrecord"]


def test_a_failed_write_is_raised(tmp_path):
    shards, latents, images = make(tmp_path)
    (tmp_path / "file").write_text("")
    shards[0] = shards[0]._replace(path=tmp_path / "file" / "0.tfrecord")
    with pytest.raises(OSError):
        list(candidates.write_candidates(batches(latents, images, 2), shards))


def test_tfds_is_imported_before_threads_start(tmp_path):
    """While it is, the imports of other threads fail."""
    code = (
        "import sys, numpy as np\n"
        "from agfsync_jax.data.candidates import write_candidates\n"
        "batches = write_candidates(iter(()), [])\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "list(batches)\n"
        "assert 'tensorflow_datasets' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("sizes", "num_processes", "batch"),
    [([12], 1, 12), ([8, 4], 1, 12), ([8, 4], 2, 16), ([8, 8, 4], 2, 24), ([8], 4, 32)],
)
def test_what_a_batch_can_hold_at_most(sizes, num_processes, batch):
    shards = [Shard(Path("x"), [{}] * size) for size in sizes]
    assert largest_batch(shards, num_processes) == batch
