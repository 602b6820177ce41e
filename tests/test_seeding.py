from dop_fast.seeding import derive, stream


def test_a_stream_depends_on_its_path_alone() -> None:
    assert stream(0, "stitch", 3, 1).random() == stream(0, "stitch", 3, 1).random()


def test_streams_of_different_paths_differ() -> None:
    paths = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", 0, 0)]
    assert len({derive(*path) for path in paths}) == len(paths)


def test_a_seed_is_what_it_was() -> None:
    # A change here changes every mask and patch that users have made.
    assert derive(0, "init") == 3912388711783151084
