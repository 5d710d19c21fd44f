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
