"""What runs on the other side of the sandbox: ``jail`` builds the walls, ``program`` runs the program inside.

Started by :mod:`tsugiki.evaluate.sandbox` as a script, standard library only; it imports nothing of the kit.
``python -I -S sandbox_child.py jail CONFIG`` makes new Linux namespaces and starts the second role in them;
``python -S -s -B /program.py program`` reads one line of limits and then the program from its standard input.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV, MNT_DETACH = 4096, 16384, 1 << 18, 2, 4, 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the same number on every architecture
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS = 1, 24, 28, 38
SECUREBITS = 0x2F  # no capabilities by being user 0, no way back: NOROOT, NO_SETUID_FIXUP, KEEP_CAPS locked off
NOBODY = 65534


# --- the walls -----------------------------------------------------------------------------------------------


def _libc():
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def call(what: str, *arguments) -> int:
        done = getattr(libc, what)(*arguments)
        if done < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"{what}: {os.strerror(error)}")
        return done

    return call


def _die_with(call, parent: int) -> None:
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _attributes(call, path: str, attributes: int, flags: int) -> None:
    """mount_setattr(2): unlike a remount it reaches the mounts below and keeps what is locked."""
    import ctypes

    setting = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, ctypes.byref(setting), ctypes.sizeof(setting))


def _bind(call, source: str, target: str, *, device: bool = False) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    call("mount", source.encode(), target.encode(), None, MS_BIND | MS_REC, None)
    if not device:
        _attributes(call, target, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, AT_RECURSIVE)


def _new_root(call, config: dict) -> None:
    """A root of its own: an empty memory file system with the given paths bound read-only and a small /tmp."""
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    root = "/sys"  # any folder that exists and is not bound below
    call("mount", b"tmpfs", root.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    os.mkdir(root + "/tmp")  # before the binds: an environment may itself lie below /tmp
    size = f"size={config['tmp_bytes']},nr_inodes=4096,mode=1777"
    call("mount", b"tmpfs", (root + "/tmp").encode(), b"tmpfs", MS_NOSUID | MS_NODEV, size.encode())
    for source, target in config["bind"]:
        _bind(call, source, root + target)
    for target, link in config["links"]:
        os.symlink(link, root + target)
    for device in config["devices"]:
        _bind(call, device, root + device, device=True)
    os.mkdir(root + "/old")
    os.chdir(root)
    call("pivot_root", b".", b"old")
    os.chdir("/")
    call("umount2", b"/old", MNT_DETACH)
    os.rmdir("/old")
    _attributes(call, "/", ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, 0)


def _drop_everything(call) -> None:
    """No capability, none to be gained, and where root started this a user that owns nothing."""
    import ctypes

    for capability in range(64):
        try:
            call("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)
        except OSError:
            break
    with contextlib.suppress(OSError):  # where only one user is mapped it stays this one
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    with contextlib.suppress(OSError):  # changing the user has given the capability up
        call("prctl", PR_SET_SECUREBITS, SECUREBITS, 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    call("capset", ctypes.byref(header), ctypes.byref(none))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _wait(child: int) -> int:
    """Reap everything until ``child`` ends; its exit status in the shell's manner."""
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _inside(call, config: dict, mapped: int) -> int:
    """In the new namespaces, as their user 0: build the root, start process 1, which starts the program."""
    os.read(mapped, 1)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    # No namespaces within: they would give capabilities back, and with them more of the kernel to reach.
    with contextlib.suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    _new_root(call, config)
    first = os.fork()
    if first:
        return _wait(first)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # process 1: when it ends, the kernel ends all others
    second = os.fork()
    if second:
        os._exit(_wait(second))
    os.setsid()
    _drop_everything(call)
    os.chdir("/tmp")
    os.closerange(3, 4096)
    os.execve(config["argv"][0], config["argv"], config["env"])
    return 1


def jail(config: dict) -> int:
    """Start ``config['argv']`` in new user, mount, process, network, IPC, UTS and cgroup namespaces."""
    call = _libc()
    _die_with(call, config["parent"])
    root = os.geteuid() == 0
    unshared, tell_unshared = os.pipe()
    mapped, tell_mapped = os.pipe()
    own = os.getpid()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(unshared), os.close(tell_mapped)
            call("unshare", NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP)
            _die_with(call, own)
            os.write(tell_unshared, b"1")
            status = _inside(call, config, mapped)
        except OSError as error:
            os.write(2, f"the namespaces cannot be made: {error}\n".encode())
            status = 125
        finally:
            os._exit(status)
    os.close(tell_unshared), os.close(mapped)
    if os.read(unshared, 1):
        # Root's own user is exempt from the limit on processes, so the program gets a user that owns nothing.
        nobody = f"{NOBODY} {NOBODY} 1\n" if root else ""
        try:
            for name, own_id in (("setgroups", None), ("gid_map", os.getegid()), ("uid_map", os.geteuid())):
                if own_id is None and root:
                    continue
                with open(f"/proc/{child}/{name}", "w") as file:
                    file.write("deny" if own_id is None else f"0 {own_id} 1\n{nobody}")
            os.write(tell_mapped, b"1")
        except OSError as error:
            os.write(2, f"the user cannot be mapped: {error}\n".encode())
            os.kill(child, signal.SIGKILL)
    return _wait(child)


# --- the program ---------------------------------------------------------------------------------------------


def program() -> None:
    """Set the limits, run the program from standard input, and say on standard error how it ended."""
    import resource

    lines = sys.stdin.buffer.readline()
    config = json.loads(lines)
    code = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    token = config["token"]
    sys.path[0:1] = []
    sys.path += config["path"]
    sys.argv = ["program"]
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_FSIZE, config["file_bytes"]),
        (resource.RLIMIT_CPU, config["cpu_seconds"]),
        (resource.RLIMIT_NPROC, config["processes"]),
        (resource.RLIMIT_AS, config["memory_bytes"]),
    ):
        resource.setrlimit(limit, (value, value))
    os.write(2, f"\n{token} start\n".encode())
    write, exit_now = os.write, os._exit
    try:
        exec(compile(code, "<program>", "exec"), {})
        sys.stdout.flush()
        said, status = "ok", 0
    except BaseException as error:  # SystemExit too: a program that leaves before its checks has not passed them
        said, status = f"error {type(error).__name__}: {error}"[:500].replace("\n", " "), 1
    write(2, f"\n{token} {said}\n".encode("utf-8", "replace"))
    exit_now(status)


if __name__ == "__main__":
    if sys.argv[1] == "jail":
        sys.exit(jail(json.loads(sys.argv[2])))
    program()
