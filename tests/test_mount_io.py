"""Input and output on mounts: which faults are tried again and which not, what is never lost, what hangs and is left."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mount_faults import FaultyOS, InlineHelper

from axo_flash import mount_helper, mount_io, mount_worker
from axo_flash.mount_io import PASSING, CopiedFile, FileInfo, MountError, MountIO
from axo_flash.mount_worker import Fault

CONTENT = os.urandom(9 << 20)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(mount_io, "FIRST_PAUSE", 0.0005)


@pytest.fixture
def places(tmp_path):
    """(a directory that stands for a mount, a local one)."""
    for name in ("mount", "local"):
        (tmp_path / name).mkdir()
    (tmp_path / "local" / "src").write_bytes(CONTENT)
    (tmp_path / "mount" / "file").write_bytes(CONTENT)
    (tmp_path / "mount" / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "mount" / "tree" / "inner" / "a.json").write_bytes(b"{}")
    return tmp_path / "mount", tmp_path / "local"


def inline(timeout=5.0):
    return MountIO(timeout, start_helper=InlineHelper)


def run_copy_in(io, mount, local):
    assert io.copy_in(str(mount / "file"), str(local / "copy"), listed=True)[::2] == (len(CONTENT), SHA256)
    assert (local / "copy").read_bytes() == CONTENT


def run_copy_out(io, mount, local):
    assert io.copy_out(str(local / "src"), str(mount / "new"))[::2] == (len(CONTENT), SHA256)
    assert (mount / "new").read_bytes() == CONTENT


def run_write_new(io, mount, local):
    io.write_new(str(mount / "manifest"), b"complete")
    assert (mount / "manifest").read_bytes() == b"complete" == io.read_bytes(str(mount / "manifest"))


def run_look(io, mount, local):
    assert io.stat(str(mount / "file")) == FileInfo(len(CONTENT), (mount / "file").stat().st_mtime_ns, False)
    assert io.stat(str(mount / "absent")) is None and io.listdir(str(mount)) == ["file", "tree"]
    assert io.walk(str(mount)) == [str(mount / "file"), str(mount / "tree/inner/a.json")]
    assert io.glob(str(mount / "**/*.json")) == [(str(mount / "tree/inner/a.json"), False)]
    assert io.glob(str(mount / "t*/inn[e]r")) == [(str(mount / "tree/inner"), True)]
    assert io.usage(str(mount)).total > 0


def run_folders(io, mount, local):
    io.makedirs(str(mount / "x/y/z"))
    assert (mount / "x/y/z").is_dir()
    io.remove_tree(str(mount / "tree"))
    assert not (mount / "tree").exists()


RUNS = [run_copy_in, run_copy_out, run_write_new, run_look, run_folders]


def reset(mount, local):
    for path in (mount / "new", mount / "manifest", local / "copy"):
        path.unlink(missing_ok=True)
    subprocess.run(["rm", "-rf", mount / "x"], check=True)
    (mount / "tree" / "inner").mkdir(parents=True, exist_ok=True)
    (mount / "tree" / "inner" / "a.json").write_bytes(b"{}")


@pytest.mark.parametrize("forever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("run", RUNS)
def test_the_nth_call_fails(places, monkeypatch, run, forever, caplog):
    """Once: everything is as if nothing had been. For ever: one MountError that says what it was."""
    n = 0
    while True:
        n += 1
        reset(*places)
        faulty = FaultyOS(places[0], n, errno.EIO, forever)
        monkeypatch.setattr(mount_worker, "os", faulty)
        io = inline(timeout=0.01 if forever else 5.0)
        if not forever:
            run(io, *places)
            assert io.stats.retries == faulty.faults
        elif faulty_run := error_of(run, io, *places):
            assert faulty_run.code == errno.EIO and faulty_run.passing and "EIO" in str(faulty_run)
            assert not (places[1] / "copy").exists()
        monkeypatch.setattr(mount_worker, "os", os)
        if not faulty.faults:
            break
        assert not faulty.descriptors, f"left open after the fault at call {n}, {faulty.calls[n - 1]}"
    assert n > 4


def error_of(run, *arguments):
    try:
        run(*arguments)
    except MountError as error:
        return error
    return None


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR])
@pytest.mark.parametrize("run", RUNS)
def test_faults_that_cannot_pass_are_not_tried_again(places, monkeypatch, run, code):
    monkeypatch.setattr(mount_worker, "os", FaultyOS(places[0], 2, code))
    io = inline()
    with pytest.raises(MountError, match=rf"{errno.errorcode[code]}.*not tried again: 1 try") as error:
        run(io, *places)
    assert io.stats.retries == 0 and error.value.code == code and not error.value.passing


@pytest.mark.parametrize("code", sorted(PASSING))
def test_faults_that_can_pass_are_tried_again(places, monkeypatch, code):
    monkeypatch.setattr(mount_worker, "os", FaultyOS(places[0], 3, code))
    io = inline()
    run_copy_in(io, *places)
    assert io.stats.retries == 1


def test_a_file_that_nobody_listed_and_one_that_was_listed(places, monkeypatch):
    with pytest.raises(MountError, match=r"ENOENT.*not tried again"):
        inline().copy_in(str(places[0] / "absent"), str(places[1] / "copy"))
    monkeypatch.setattr(mount_worker, "os", FaultyOS(places[0], 1, errno.ENOENT))
    run_copy_in(inline(), *places)  # listed


def test_the_local_disk_is_not_a_mount_that_recovers(places, monkeypatch):
    monkeypatch.setattr(mount_worker, "os", FaultyOS(places[1], 4, errno.EIO))
    with pytest.raises(MountError, match=r"copy.part.*EIO.*not tried again"):
        run_copy_in(inline(), *places)


def test_the_error_says_where_what_how_long_and_what_to_do(places, monkeypatch):
    monkeypatch.setattr(mount_worker, "os", FaultyOS(places[0], 4, errno.ENOTCONN, forever=True))
    with pytest.raises(MountError) as error:
        run_copy_in(inline(timeout=0.05), *places)
    message = str(error.value)
    assert f"copy_in of {places[0] / 'file'}, which got to byte 524,288, on " in message and "ENOTCONN" in message
    assert f"gave up after {error.value.tries} tries in 0." in message and "fusermount3 -uz" in message
    assert str(mount_io.find_mount(places[0])) in message


def test_a_name_that_is_taken_is_never_touched(places):
    for call in (lambda io, path: io.copy_out(str(places[1] / "src"), path), lambda io, path: io.write_new(path, b"x")):
        with pytest.raises(MountError, match=r"EEXIST.*Nothing on a mount is ever overwritten"):
            call(inline(), str(places[0] / "tree/inner/a.json"))
    assert (places[0] / "tree/inner/a.json").read_bytes() == b"{}"


def test_a_name_that_was_taken_before_a_fault_is_never_touched(places, monkeypatch):
    """The first call, which was to see whether the name is free, fails: what lies there is not ours to remove."""
    monkeypatch.setattr(mount_worker, "os", FaultyOS(places[0], 1, errno.EIO))
    io = inline()
    with pytest.raises(MountError, match="EEXIST"):
        io.write_new(str(places[0] / "tree/inner/a.json"), b"x")
    assert io.stats.retries == 1 and (places[0] / "tree/inner/a.json").read_bytes() == b"{}"


@pytest.mark.parametrize("lie", ["lost", "torn"])
def test_a_write_that_was_not_stored_is_found_and_done_again(places, monkeypatch, lie):
    real, lies = os.write, [1]

    class Lying(FaultyOS):
        def __getattr__(self, name):
            call = super().__getattr__(name)
            if name != "write":
                return call

            def write(descriptor, block):
                if descriptor not in self.descriptors or not lies:
                    return call(descriptor, block)
                lies.pop()
                if lie == "torn":
                    real(descriptor, block[: len(block) // 2])
                return len(block)

            return write

    monkeypatch.setattr(mount_worker, "os", Lying(places[0]))
    io = inline()
    run_copy_out(io, *places)
    assert io.stats.retries == 1 and not lies


def test_a_file_that_changes_while_it_is_read_is_read_again(places):
    changes = [b"longer" + CONTENT, CONTENT]

    def change(at):
        if at == 8 << 20 and changes:
            (places[0] / "file").write_bytes(changes.pop(0))

    io = inline()
    copied = io.copy_in(str(places[0] / "file"), str(places[1] / "copy"), change)
    assert copied.sha256 == SHA256 and (places[1] / "copy").read_bytes() == CONTENT
    assert io.stats.retries == 2


def test_read_bytes_has_a_limit(places):
    with pytest.raises(MountError, match=r"EFBIG, it has 9437184 bytes, and at most 100 are wanted"):
        inline().read_bytes(str(places[0] / "file"), 100)


def test_a_mount_that_went_away_is_not_the_local_disk_underneath(places):
    io = inline(timeout=0.02)
    io.expect_mount(str(places[0]))  # where nothing is mounted
    for call in (lambda: io.makedirs(str(places[0] / "new")), lambda: io.stat(str(places[0] / "file"))):
        with pytest.raises(MountError, match=r"ENOTCONN, nothing is mounted at .*mount now .*mount it again"):
            call()
    assert not (places[0] / "new").exists()


def test_a_remount_in_the_middle_is_noticed(places, monkeypatch):
    real, identities = mount_io.find_mount, iter(["a", "b"])

    def find(path):
        mount = real(path)
        return mount_io_mount(mount, next(identities, "b"))

    monkeypatch.setattr(mount_io, "find_mount", find)
    io = inline()
    run_copy_in(io, *places)
    assert io.stats.retries == 1


def mount_io_mount(mount, identity):
    return type(mount)(mount.mount_point, mount.fstype, mount.source, identity)


def test_the_time_counts_from_where_a_try_last_got_further(places, monkeypatch):
    """A copy that takes longer than `timeout` in all, with a fault at each of its blocks, gets there."""
    faults = iter(range(1, 20))
    limit = [next(faults)]

    class Creeping(InlineHelper):
        def call(self, operation, arguments, heard, stall_timeout, path):
            def slow(message):
                heard(message)
                if message.get("at", 0) >= limit[0] << 20 and limit[0] < 9:
                    limit[0] = next(faults)
                    time.sleep(0.04)
                    raise Fault(errno.EIO, "again", path, message["at"])

            monkeypatch.setattr(mount_worker, "BLOCK_BYTES", 1 << 20)
            return super().call(operation, arguments, slow, stall_timeout, path)

    io = MountIO(0.2, start_helper=Creeping)
    started = time.monotonic()
    run_copy_in(io, *places)
    assert io.stats.retries == 8 and time.monotonic() - started > 0.3


# ----------------------------------------------------------------------------------------------- with a real process
@pytest.fixture
def io():
    with MountIO(timeout=20, stall_timeout=1) as made:
        yield made


def test_the_helper_process_does_everything(io, places):
    for run in RUNS:
        reset(*places)
        run(io, *places)
    with pytest.raises(MountError, match="ENOENT"):
        io.listdir(str(places[0] / "absent"))
    seen = []
    copied = io.copy_in(str(places[0] / "file"), str(places[1] / "copy"), seen.append)
    assert isinstance(copied, CopiedFile) and seen == sorted(seen) and seen[-1] == 9 << 20
    assert io.stats.retries == 0 and not any(os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(places[0]))
                                             for fd in os.listdir("/proc/self/fd"))  # fmt: skip
    pid = io._helper.process.pid
    io.close()
    assert not os.path.exists(f"/proc/{pid}")
    assert io.stat(str(places[0])).is_dir  # a new one starts when it is needed


def test_a_helper_that_hangs_is_left_behind_and_the_read_done_again(io, places, caplog):
    fifo = places[0] / "hangs"
    os.mkfifo(fifo)  # opening it waits for a writer
    timer = threading.Timer(0.5, lambda: (fifo.unlink(), (places[0] / "hangs").write_bytes(CONTENT)))
    timer.start()
    assert io.copy_in(str(fifo), str(places[1] / "copy"), listed=True).sha256 == SHA256
    assert io.stats.stalls == 1 and "no progress for 1 s" in caplog.text


def test_a_hang_for_ever_ends_in_an_error_within_the_stated_time(places):
    os.mkfifo(places[0] / "hangs")
    started = time.monotonic()
    with (
        MountIO(timeout=1.0, stall_timeout=0.4) as io,
        pytest.raises(MountError, match=r"hangs on .*ETIMEDOUT, no progress for 0.4 s \(gave up after \d tries"),
    ):
        io.copy_in(str(places[0] / "hangs"), str(places[1] / "copy"))
    assert time.monotonic() - started < 10


def test_a_helper_that_is_killed_is_replaced(io, places):
    io.stat(str(places[0]))
    io._helper.process.kill()
    io._helper.process.wait()
    run_copy_in(io, *places)
    assert io.stats.retries == 1 and io.stats.stalls == 0


def test_no_write_beside_a_helper_that_may_still_write_there(io, places):
    """A helper that was left behind in a write may yet finish it: over what a new try would store in the place."""
    io.stat(str(places[0]))
    helper = io._helper
    monkey = mount_io._Try(str(places[0] / "new"), writes=True)
    kill, helper.kill = helper.kill, lambda: None  # as one that hangs in the kernel, where no signal reaches it
    io._leave_behind(monkey)
    threading.Timer(2.0, kill).start()
    started = time.monotonic()
    assert io.stat(str(places[0] / "file")).size == len(CONTENT)  # reading need not wait
    assert time.monotonic() - started < 1.5
    run_copy_out(io, *places)
    assert time.monotonic() - started > 1.5 and io.stats.retries > 0


def test_an_interrupted_call_leaves_no_answer_for_the_next(io, places):
    def interrupt(at):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        io.copy_in(str(places[0] / "file"), str(places[1] / "copy"), interrupt)
    assert io.listdir(str(places[0])) == ["file", "tree"]


@pytest.mark.parametrize("where", ["hanging", "pausing"])
def test_a_call_is_stopped_from_another_thread(places, monkeypatch, where):
    if where == "hanging":
        os.mkfifo(places[0] / "file2")
    else:
        monkeypatch.setattr(mount_io, "FIRST_PAUSE", 50.0)
    started = time.monotonic()
    with MountIO(timeout=100, stall_timeout=50) as io:
        threading.Timer(0.4, io.stop).start()
        for _ in range(2):  # the one that runs, and later ones
            with pytest.raises(MountError, match="ECANCELED, it was told to stop"):
                io.copy_in(str(places[0] / "file2"), str(places[1] / "copy"), listed=True)
    assert time.monotonic() - started < 10


def test_the_helper_ends_with_its_parent(places):
    code = "import os,sys; from axo_flash.mount_io import MountIO; io = MountIO(); io.stat('/'); "
    code += "print(io._helper.process.pid, flush=True); os.kill(os.getpid(), 9)"
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout)
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except FileNotFoundError:
            return
        if state == "Z":  # dead; init here may not reap
            return
        time.sleep(0.05)
    raise AssertionError("it lives on")


def test_a_helper_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr(mount_helper.mount_worker, "__file__", "/absent/worker.py")
    with pytest.raises(RuntimeError, match=r"did not start .*/absent/worker.py, exit code 2"):
        MountIO().stat("/")


def test_a_helper_that_is_killed_while_it_starts_is_replaced(places, monkeypatch, tmp_path):
    """As the kernel does when memory runs out: no reason to give up what can be tried again."""
    worker = tmp_path / "worker.py"
    worker.write_text("import os; os.kill(os.getpid(), 9)")
    real = mount_worker.__file__
    monkeypatch.setattr(mount_helper.mount_worker, "__file__", str(worker))
    with MountIO(timeout=60) as io:
        threading.Timer(0.5, lambda: monkeypatch.setattr(mount_helper.mount_worker, "__file__", real)).start()
        run_copy_in(io, *places)
        assert io.stats.retries >= 1
    monkeypatch.setattr(mount_helper.mount_worker, "__file__", str(worker))
    with MountIO(timeout=0.2) as io, pytest.raises(MountError, match=r"EPIPE, the helper process .* exit code -9"):
        io.stat("/")


def test_what_lies_below_a_mount_that_went_away_says_nothing(places, monkeypatch):
    """Between our look and the call the mount goes: the local directory underneath has no such file."""
    mounts = [mount_io.find_mount(places[0]), dataclasses.replace(mount_io.find_mount(places[0]), identity="other")]
    monkeypatch.setattr(mount_io, "find_mount", lambda path: mounts[0])

    class Gone(InlineHelper):
        def call(self, operation, arguments, heard, stall_timeout, path):
            if not (places[0] / "file").exists():
                mounts.reverse()
                (places[0] / "hidden").rename(places[0] / "file")
                raise Fault(errno.ENOENT, "No such file or directory", path)
            return super().call(operation, arguments, heard, stall_timeout, path)

    (places[0] / "file").rename(places[0] / "hidden")
    io = MountIO(5.0, start_helper=Gone)
    assert io.listdir(str(places[0])) == ["file", "tree"] and io.stats.retries == 1


@pytest.mark.parametrize("operation", ["makedirs", "write_new", "copy_out"])
def test_nothing_is_made_underneath_a_mount_that_has_just_gone(places, operation):
    """The mount was there when we looked: the directory that is there now is on another device."""
    mount, local = places
    there = os.stat(mount).st_dev
    arguments = {
        "makedirs": {"path": str(mount / "a" / "b")},
        "write_new": {"path": str(mount / "new"), "content": "", "ours": False},
        "copy_out": {"src": str(local / "src"), "dst": str(mount / "new"), "ours": False},
    }[operation]
    before = sorted(mount.rglob("*"))
    with pytest.raises(Fault, match="ENOTCONN, the mount has gone: this is the directory underneath"):
        mount_worker.OPERATIONS[operation](lambda message: None, **arguments, device="0:0")
    assert sorted(mount.rglob("*")) == before
    device = f"{os.major(there)}:{os.minor(there)}"
    mount_worker.OPERATIONS[operation](lambda message: None, **arguments, device=device)
    assert sorted(mount.rglob("*")) != before


def test_the_device_is_that_of_the_mount_that_was_seen(places, monkeypatch):
    """Looked up once: a second look, when the mount has gone, would find the local disk and allow it."""
    mount = dataclasses.replace(mount_io.find_mount(places[0]), fstype="fuse.test", identity="7 0:99")
    looks = iter([mount])
    monkeypatch.setattr(mount_io, "find_mount", lambda path: next(looks, dataclasses.replace(mount, fstype="ext4")))
    with pytest.raises(MountError, match="the mount has gone: this is the directory underneath"):
        inline(timeout=0.0).makedirs(str(places[0] / "a"))
    assert not (places[0] / "a").exists()


def test_pauses_leave_pythons_random_numbers_alone(places, monkeypatch):
    """A training that draws from `random` must not depend on what a mount does meanwhile."""
    random.seed(7)
    before = random.getstate()
    monkeypatch.setattr(mount_worker, "os", FaultyOS(places[0], 1))
    run_copy_in(io := inline(), *places)
    assert io.stats.retries == 1 and random.getstate() == before
    assert all(0 <= mount_io._pause(tries) <= mount_io.LONGEST_PAUSE for tries in (1, 10, 5000))


def test_mount_io_needs_no_torch():
    code = "import sys, axo_flash.mount_io, axo_flash.mounts; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
