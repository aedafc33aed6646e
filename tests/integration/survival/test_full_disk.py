"""A disk that is full in the middle of a save: the old checkpoint stays, the message is clear, the run goes on."""

from hdm_lightning.training.checkpoint_io import read_checkpoint


def test_a_full_disk_during_a_save(toy, server, same):
    whole, filled = toy("whole"), toy("filled")
    assert server.run(whole) == [0]
    assert server.run(filled, fill_disk={"at": 2}) == [2]
    told = server.log.read_text()
    assert "the disk is full" in told and "step-00000004.ckpt" in told and "hint:" in told and "Traceback" not in told
    checkpoints = filled.stage_folder(1) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002.ckpt"]
    assert read_checkpoint(checkpoints / "step-00000002.ckpt")["hdm"]["step"] == 2
    assert server.run(filled) == [0]
    assert same(whole.end(), filled.end())


def test_a_limit_of_file_sizes_reached_by_the_first_save(toy, server):
    """The operating system's own refusal (RLIMIT_FSIZE) in place of an exception made up by the test."""
    limited = toy("limited")
    assert server.run(limited, limit_files={"size": 100_000}) == [2]
    assert "the disk is full" in server.log.read_text()
    assert list((limited.stage_folder(1) / "checkpoints").iterdir()) == []
    assert server.run(limited) == [0]
