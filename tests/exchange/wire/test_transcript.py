import pytest
from wire_vendor import CountingVendor, batch, opening

from blindtune.errors import ConfigError, PackageError
from blindtune.exchange.wire.codec import encode
from blindtune.exchange.wire.messages import Batch, BatchResult, Hello, Step, equal
from blindtune.exchange.wire.transcript import Recorder, Recording, Transcript, open_transcript
from blindtune.exchange.wire.transport import InProcessTransport


def record(rows=3, **options):
    recorder = Recorder(**options)
    with CountingVendor().session("a") as handler:
        transport = InProcessTransport(handler, tap=recorder)
        for message in (Hello(program="test"), opening(), batch(1, rows=rows, width=512)):
            transport.call(message)
    return recorder


def test_a_transcript_holds_what_crossed(tmp_path):
    transcript = record(rows=1500).transcript()
    transcript.save(tmp_path / "run.transcript")
    again = open_transcript(tmp_path / "run.transcript")
    assert again.frames == transcript.frames
    crossings = list(again.crossings())
    assert [type(c.message).__name__ for c in crossings] == [
        "Hello", "Welcome", "OpenJob", "JobState", "Batch", "BatchResult",
    ]  # fmt: skip
    assert [c.direction for c in crossings] == ["request", "reply"] * 3
    assert [c.exchange for c in crossings] == [1, 1, 2, 2, 3, 3]
    assert {c.connection for c in crossings} == {1}
    sent = batch(1, rows=1500, width=512)
    assert isinstance(crossings[-2].message, Batch)
    assert isinstance(crossings[-1].message, BatchResult)
    assert b"".join(encode(sent, 3)) in again.wire("request")
    assert b"".join(encode(sent, 3)) not in again.wire("reply")
    assert len(again.wire()) == len(again.wire("request")) + len(again.wire("reply"))


def test_messages_cut_off_by_a_lost_connection_are_left_out():
    large = list(encode(batch(1, rows=1500, width=512), 2))
    hello = next(encode(Hello(program="test"), 1))
    step = Step(sequence=1)
    frames = [hello, large[0], hello, *encode(step, 2)]
    crossings = list(Transcript(tuple(("request", f) for f in frames)).crossings())
    assert [c.connection for c in crossings] == [1, 2, 2]
    assert equal(crossings[-1].message, step)


@pytest.mark.parametrize("damage", ["truncate", "flip", "magic", "direction", "long"])
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "t"
    record().transcript().save(path)
    content = bytearray(path.read_bytes())
    match damage:
        case "truncate":
            del content[-1]
        case "flip":
            content[-1] ^= 1
        case "magic":
            content[4] = 2
        case "direction":
            content[8] = 2
        case "long":
            content[9:13] = b"\xff" * 4
    path.write_bytes(content)
    with pytest.raises(PackageError):
        open_transcript(path)


def test_bounds(tmp_path):
    with pytest.raises(ConfigError, match="max_bytes"):
        record(max_bytes=100).transcript()
    record().transcript().save(tmp_path / "t")
    with pytest.raises(PackageError, match="at most 100"):
        open_transcript(tmp_path / "t", max_bytes=100)


def recorded(path, *messages, **options):
    recording = Recording(path, **options)
    with CountingVendor().session("a") as handler:
        transport = InProcessTransport(handler, tap=recording)
        for message in (Hello(program="test"), opening(), *messages):
            transport.call(message)
    recording.close()


@pytest.mark.parametrize("torn", [0, 1, 5, 4000])
def test_a_recording_goes_on_where_a_killed_process_ended(tmp_path, torn):
    path = tmp_path / "transcript.bin"
    Recording.begin(path)
    assert path.stat().st_mode & 0o777 == 0o600
    recorded(path, batch(1, rows=3, width=512))
    whole = record().transcript().frames
    assert open_transcript(path).frames == whole
    if torn:
        path.write_bytes(path.read_bytes()[:-torn])
    recorded(path)
    kept = [frame for frame in open_transcript(path).frames if frame[0] == "request"]
    assert [c.connection for c in open_transcript(path).crossings()][-1] == 2
    sent = [frame for frame in whole if frame[0] == "request"]
    lost = sum(len(frame) for _, frame in whole[-1:]) < torn  # the batch's own frame is torn too
    assert kept[: len(sent) - lost] == sent[: len(sent) - lost]


def test_a_recording_is_whole_or_none(tmp_path, caplog, monkeypatch):
    path = tmp_path / "transcript.bin"
    Recording.begin(path)
    recorded(path, batch(1, rows=3, width=512), max_bytes=2000)
    assert path.read_bytes() == b""
    assert "more than 2,000 bytes crossed" in caplog.text
    Recording.begin(path)
    with monkeypatch.context() as full:
        full.setattr("os.write", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
        recorded(path)
    assert path.read_bytes() == b""
    assert "disk full" in caplog.text
    path.write_bytes(b"something else")
    with pytest.raises(PackageError, match="not a transcript"):
        Recording(path)
    assert path.read_bytes() == b"something else"


@pytest.mark.parametrize("forged", [b"", b"19 bytes of garbage", bytes((1 << 20) + 1)])
def test_what_a_vendor_forges_does_not_spoil_the_file(tmp_path, forged):
    """The connection ends by it, and what the next one carries is recorded."""
    path = tmp_path / "transcript.bin"
    Recording.begin(path)
    recording = Recording(path)
    whole = record().transcript().frames
    for direction, frame in (*whole, ("reply", forged), *whole):
        recording(direction, frame)
    recording.close()
    recording("reply", b"too late")
    assert open_transcript(path).frames == (*whole, *whole)


def test_half_a_message_that_is_then_forged_is_left_out(tmp_path):
    path = tmp_path / "transcript.bin"
    Recording.begin(path)
    recording = Recording(path)
    large = list(encode(batch(1, rows=1500, width=512), 2))
    hello = next(encode(Hello(program="test"), 1))
    for frame in (hello, large[0], large[1][:-1] + b"?", hello):
        recording("request", frame)
    recording.close()
    names = [type(c.message).__name__ for c in open_transcript(path).crossings()]
    assert names == ["Hello", "Hello"]
