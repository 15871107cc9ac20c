"""How jobs end at the vendor, and what is left of them: cancelled, expired, lost, killed amid."""

import shutil
import threading
import time

import pytest
from split_world import FAST, World
from test_vendor import Stream, batch, opening

from blindtune.errors import PolicyError
from blindtune.exchange.wire.events import JobClosed
from blindtune.exchange.wire.messages import Cancel, ResumeJob
from blindtune.split.customer.access import resume_job
from blindtune.split.customer.requests import new_token
from blindtune.split.terms import VendorLimits
from blindtune.split.vendor import job_book, store
from blindtune.split.vendor.store import JobStore


def killed(*_anything):
    raise KeyboardInterrupt


def test_idle_jobs_are_forgotten_but_not_by_a_clock_that_jumps(tmp_path, monkeypatch):
    told = []
    world = World(tmp_path, observer=told.append)
    token, other = new_token(), new_token()
    Stream(world, opened=opening(world, token=token)).ask(batch(1))
    month = 31 * 86400
    clock = {"time": time.time(), "monotonic": time.monotonic()}
    monkeypatch.setattr(store.time, "time", lambda: clock["time"])
    monkeypatch.setattr(job_book.time, "monotonic", lambda: clock["monotonic"])
    clock["time"] += month
    world.vendor.expire()
    clock["time"] -= month
    clock["monotonic"] += 7200
    world.vendor.expire()
    assert world.vendor.open_jobs() == 1  # the clock had jumped and came back
    clock["time"] += month
    world.vendor.expire()
    clock["monotonic"] += 7200
    world.vendor.expire()
    assert world.vendor.open_jobs() == 0
    assert not list((tmp_path / "vendor").rglob("*.pt"))
    late = Stream(world, opened=ResumeJob(token=token))
    assert late.opened.state == "closed"
    assert "has ended" in late.ask(batch(2)).message
    world.start()
    with pytest.raises(PolicyError, match="has ended"):
        resume_job(world.connect, token, FAST)
    assert Stream(world, opened=opening(world, token=other)).opened.state == "open"
    assert [event.customer for event in told if isinstance(event, JobClosed)] == ["anna"]


def test_a_job_without_a_checkpoint_ends_and_gives_up_its_place(tmp_path):
    world = World(tmp_path, limits=VendorLimits(max_jobs_per_customer=1))
    token = new_token()
    Stream(world, opened=opening(world, token=token)).ask(batch(1))
    world.start()
    for path in (tmp_path / "vendor").rglob("at-*.pt"):
        path.unlink()
    stream = Stream(world, opened=ResumeJob(token=token))
    assert stream.opened.state == "closed"
    assert "checkpoints were lost" in stream.ask(batch(1)).message
    assert Stream(world, opened=opening(world)).opened.state == "open"
    assert stream.ask(Cancel()).state == "cancelled"


def test_cancelled_jobs_are_forgotten(tmp_path):
    world, token = World(tmp_path), new_token()
    stream = Stream(world, opened=opening(world, token=token))
    stream.ask(batch(1))
    assert stream.ask(Cancel()).state == "cancelled"
    assert stream.ask(Cancel()).state == "cancelled"
    assert stream.ask(batch(2)).code == "policy"
    assert not list((tmp_path / "vendor").rglob("*.pt"))
    assert not any(
        "lora" in n for n, _ in world.vendor._model.served.stack.model.named_parameters()
    )
    world.start()
    assert Stream(world, opened=ResumeJob(token=token)).opened.state == "cancelled"
    Stream(world, opened=opening(world))


@pytest.mark.parametrize(
    "moment", ["NumberedStates.drop_after", "remove_left_overs", "JobStore.write", "JobStore.touch"]
)
@pytest.mark.parametrize("end", ["cancel", "_close"])
def test_killed_while_a_job_ends_no_state_outlives_its_end(tmp_path, monkeypatch, moment, end):
    world, token = World(tmp_path), new_token()
    Stream(world, opened=opening(world, token=token)).ask(batch(1))
    jobs = world.vendor._jobs
    with monkeypatch.context() as patched:
        patched.setattr(f"blindtune.split.vendor.store.{moment}", killed)
        with pytest.raises(KeyboardInterrupt):
            getattr(jobs, end)(next(iter(jobs)))
    world.start()
    states = list((tmp_path / "vendor").rglob("*.pt"))
    stream = Stream(world, opened=ResumeJob(token=token))
    assert (stream.opened.state == "open") == bool(states)
    assert stream.ask(Cancel()).state == "cancelled"
    assert not list((tmp_path / "vendor").rglob("*.pt"))


def test_states_of_ended_jobs_go_at_the_start_and_when_cancelled_again(tmp_path):
    world, token = World(tmp_path), new_token()
    stream = Stream(world, opened=opening(world, token=token))
    (state,) = (tmp_path / "vendor").rglob("at-*.pt")
    learned = state.read_bytes()
    stream.ask(Cancel())
    for ask in (world.start, lambda: stream.ask(Cancel())):
        state.write_bytes(learned)
        ask()
        assert not state.exists()


@pytest.mark.parametrize("gone", ["its folder", "its record"])
@pytest.mark.parametrize("state", ["open", "resting", "cancelled"])
def test_a_job_whose_folder_is_gone_stops_no_other(tmp_path, gone, state):
    world, token = World(tmp_path), new_token()
    stream = Stream(world, opened=opening(world, token=token))
    (folder,) = (tmp_path / "vendor" / "jobs").iterdir()
    if state == "cancelled":
        stream.ask(Cancel())
    if state == "resting":
        world.start()
    if gone == "its record":
        (folder / "job.json").unlink()
    else:
        shutil.rmtree(folder)
    world.vendor.expire()
    assert Stream(world, "bert", opening(world)).opened.state == "open"
    found = Stream(world, opened=ResumeJob(token=token)).opened
    if state == "cancelled":
        assert found.code == "unknown-job"
    else:
        assert found.state == "closed"
        assert not list(folder.rglob("*.pt"))
    if state == "open":
        assert "has ended" in stream.ask(batch(1)).message
    world.start()
    assert world.vendor.open_jobs() == 1


def test_expiry_goes_on_behind_a_job_that_the_disk_refuses(tmp_path, monkeypatch, caplog):
    world, tokens = World(tmp_path), [new_token() for _ in range(6)]
    streams = [Stream(world, name, opening(world, token=token))
               for name, token in zip("abcdef", tokens, strict=True)]  # fmt: skip
    for stream in streams[3:]:
        stream.ask(Cancel())
    clock = {"time": time.time() + 31 * 86400, "monotonic": time.monotonic()}
    monkeypatch.setattr(store.time, "time", lambda: clock["time"])
    monkeypatch.setattr(job_book.time, "monotonic", lambda: clock["monotonic"])
    open_jobs = [job.record.name for job in world.vendor._jobs if job.record.state == "open"]
    ended = [job.record.name for job in world.vendor._jobs if job.record.state != "open"]
    drop, remove = JobStore.drop_states, JobStore.remove

    def refuse(name, among, work, store):
        if name == among[0]:
            raise OSError(5, "Input/output error")
        work(store, name)

    monkeypatch.setattr(
        JobStore, "drop_states", lambda store, name: refuse(name, open_jobs, drop, store)
    )
    monkeypatch.setattr(JobStore, "remove", lambda store, name: refuse(name, ended, remove, store))
    world.vendor.expire()
    clock["monotonic"] += 7200
    world.vendor.expire()
    assert world.vendor.open_jobs() == 1
    assert {job.record.name for job in world.vendor._jobs} == {*open_jobs}
    assert (tmp_path / "vendor" / "jobs" / ended[0]).exists()
    assert not any((tmp_path / "vendor" / "jobs" / name).exists() for name in ended[1:])
    assert open_jobs[0] in caplog.text
    assert ended[0] in caplog.text


def test_few_ended_jobs_are_remembered_and_none_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(job_book, "ENDED_KEPT", 3)
    clock = {"time": time.time()}
    monkeypatch.setattr(store.time, "time", lambda: clock["time"])
    world = World(tmp_path)
    tokens = [new_token() for _ in range(6)]
    for token in tokens:
        clock["time"] += 1
        stream = Stream(world, opened=opening(world, token=token))
        assert stream.ask(Cancel()).state == "cancelled"
    world.vendor.expire()
    assert len(list((tmp_path / "vendor" / "jobs").iterdir())) == 3
    assert Stream(world, opened=ResumeJob(token=tokens[0])).opened.code == "unknown-job"
    assert Stream(world, opened=ResumeJob(token=tokens[-1])).opened.state == "cancelled"
    world.start()
    clock["time"] += 31 * 86400
    world.vendor.expire()
    assert not list((tmp_path / "vendor" / "jobs").iterdir())
    Stream(world, opened=opening(world))


def test_what_a_killed_opening_left_is_removed_but_never_from_one_that_goes_on(
    tmp_path, monkeypatch
):
    world, jobs, token = World(tmp_path), tmp_path / "vendor" / "jobs", new_token()
    begun, go_on, write = threading.Event(), threading.Event(), JobStore.write

    def slow(self, record):
        begun.set()
        assert go_on.wait(10)
        write(self, record)

    with monkeypatch.context() as patched:
        patched.setattr(JobStore, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            Stream(world, opened=opening(world))
    (left,) = jobs.iterdir()
    world.vendor.expire()
    assert left.exists()  # it is not old
    clock = time.time() + 3700
    monkeypatch.setattr(store.time, "time", lambda: clock)
    monkeypatch.setattr(JobStore, "write", slow)
    opens = threading.Thread(target=Stream, args=(world, "anna", opening(world, token=token)))
    opens.start()
    assert begun.wait(10)
    assert not left.exists()
    (fresh,) = jobs.iterdir()  # for a clock that has jumped it is old, and without a record
    keeps = threading.Thread(target=world.vendor.expire)
    keeps.start()
    keeps.join(0.2)
    assert fresh.exists()
    go_on.set()
    opens.join(10)
    keeps.join(10)
    assert Stream(world, opened=ResumeJob(token=token)).opened.state == "open"


def test_what_a_killed_removal_left_is_removed_at_the_start(tmp_path, monkeypatch):
    world, jobs = World(tmp_path), tmp_path / "vendor" / "jobs"
    Stream(world, opened=opening(world)).ask(Cancel())
    (job,) = jobs.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr("blindtune.atomic._remove", killed)
        with pytest.raises(KeyboardInterrupt):
            JobStore(tmp_path / "vendor", world.bottom.id).remove(job.name)
    assert list(jobs.iterdir())
    world.start()
    assert not list(jobs.iterdir())
