"""The time of a selection, over all its sessions."""

from lensjax.select import timing


def test_the_stopwatch_counts_all_sessions_and_forgives_a_bad_file(tmp_path, monkeypatch):
    now = [10.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    path = tmp_path / "stopwatch.json"
    watch = timing.Stopwatch(path, 0.0)
    now[0] = 13.0
    watch.pause()
    now[0] = 100.0
    assert watch.seconds == 3
    watch.resume()
    now[0] = 107.0
    assert watch.deadline(12.0) == 109.0
    watch.save()  # and then it is killed
    later = timing.Stopwatch(path, 0.0)
    assert later.seconds == 10
    damages = ("", "[]", '{"seconds": NaN}', '{"seconds": -1}', '{"seconds": 1e999}', '{"seconds": null}', "[" * 100000)
    for damage in (*damages, '{"seconds": ' + "9" * 5000 + "}", "\xff"):
        path.write_text(damage, "latin-1")
        assert timing.Stopwatch(path, 4.0).seconds == 4
    path.unlink()
    path.mkdir()
    damaged = timing.Stopwatch(path, 5.0)
    damaged.pause()
    assert damaged.seconds == 5
