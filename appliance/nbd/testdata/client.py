"""libnbd against the server: argv[1] is the socket, argv[2] "structured" or "simple".

The export "disk" has 64 MiB of zeros and no preferred contents; "ro" is
read-only and has 1 MiB."""
import errno
import os
import sys

import nbd

SOCKET, MODE = sys.argv[1], sys.argv[2]
SIZE = 64 << 20


def connect(name, strict=True):
    h = nbd.NBD()
    h.set_export_name(name)
    h.set_request_structured_replies(MODE == "structured")
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    if not strict:
        h.set_strict_mode(0)
    h.connect_unix(SOCKET)
    return h


def fails(what, want, call, *args, **kw):
    try:
        call(*args, **kw)
    except nbd.Error as e:
        assert e.errnum == want, (what, e.errnum, str(e))
        return
    raise AssertionError(what + " succeeded")


def negotiation():
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_unix(SOCKET)
    names = []
    n = h.opt_list(lambda name, text: names.append((name, text)))
    assert n == 2 and names == [("disk", "a disk"), ("ro", "")], names
    h.set_export_name("nothing")
    fails("info of nothing", errno.ENOENT, h.opt_info)
    h.set_export_name("ro")
    h.opt_info()
    assert h.get_size() == 1 << 20 and h.is_read_only()
    contexts = []
    h.opt_list_meta_context(contexts.append)
    assert contexts == ["base:allocation"], contexts
    h.set_export_name("disk")
    h.set_full_info(True)
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.opt_info()
    assert h.get_canonical_export_name() == "disk" and h.get_export_description() == "a disk"
    h.opt_go()
    assert h.get_size() == SIZE
    assert (h.get_block_size(nbd.SIZE_MINIMUM), h.get_block_size(nbd.SIZE_PREFERRED),
            h.get_block_size(nbd.SIZE_MAXIMUM)) == (1, 4096, 32 << 20)
    h.shutdown()
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_unix(SOCKET)
    h.opt_abort()


def flags(h):
    structured = MODE == "structured"
    assert h.get_structured_replies_negotiated() == structured
    assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION) == structured
    assert h.can_df() == structured
    assert h.can_flush() and h.can_fua() and h.can_trim() and h.can_zero() and h.can_multi_conn()
    assert not h.can_fast_zero() and not h.can_cache() and not h.is_rotational() and not h.is_read_only()


def content(h):
    for off, n in ((0, 1), (1, 511), (4095, 2), (1000, 300000), (SIZE - 7, 7), (12345, 9 << 20), (0, 32 << 20)):
        p = os.urandom(n)
        h.pwrite(p, off, nbd.CMD_FLAG_FUA if n % 2 else 0)
        assert h.pread(n, off) == p, (off, n)
        if MODE == "structured":
            chunks = []
            got = h.pread_structured(n, off, lambda buf, at, status, err: chunks.append((at, status)) or 0, nbd.CMD_FLAG_DF)
            assert got == p and chunks == [(off, nbd.READ_DATA)], chunks
    h.flush()
    h.zero(5000, 100)
    assert h.pread(5002, 99)[1:5001] == bytearray(5000)
    h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
    h.trim(1 << 20, 1 << 20, nbd.CMD_FLAG_FUA)
    assert h.pread(1 << 20, 1 << 20) == bytearray(1 << 20)


def allocation(h):
    if MODE != "structured":
        fails("block status", errno.ENOTSUP, h.block_status, SIZE, 0, lambda *a: 0)
        return
    h.trim(SIZE, 0)
    h.pwrite(b"x" * 65536, 1 << 20)
    h.flush()

    def status(n, off, flags=0):
        got = []
        h.block_status(n, off, lambda metactx, offset, entries, err: got.append((metactx, offset, entries)) or 0, flags)
        (metactx, offset, entries), = got
        assert metactx == "base:allocation" and offset == off
        return entries
    assert status(SIZE, 0) == [1 << 20, 3, 65536, 0, SIZE - (1 << 20) - 65536, 3], status(SIZE, 0)
    assert status(SIZE, 0, nbd.CMD_FLAG_REQ_ONE) == [1 << 20, 3]
    assert status(512, (1 << 20) + 100) == [512, 0]


def errors():
    h = connect("disk", strict=False)
    fails("write past the end", errno.ENOSPC, h.pwrite, b"xx", SIZE - 1)
    fails("zero past the end", errno.ENOSPC, h.zero, 2, SIZE - 1)
    fails("read past the end", errno.EINVAL, h.pread, 2, SIZE - 1)
    fails("trim past the end", errno.EINVAL, h.trim, 2, SIZE - 1)
    fails("cache", errno.EINVAL, h.cache, 512, 0)
    fails("fast zero", errno.ENOTSUP, h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
    assert h.pread(0, 0) == b""
    h.pwrite(b"still alive", 0)
    ro = connect("ro", strict=False)
    for what, call in (("write", lambda: ro.pwrite(b"x", 0)), ("trim", lambda: ro.trim(1, 0)), ("zero", lambda: ro.zero(1, 0))):
        fails(what + ", read-only", errno.EPERM, call)
    ro.pread(512, 0)
    ro.flush()
    ro.shutdown()
    h.shutdown()


def parallel(h):
    """Many requests at once, to their own places."""
    count, n = 200, 40000
    bufs = [nbd.Buffer.from_bytearray(bytearray(os.urandom(n))) for _ in range(count)]
    errors = []

    def done(err):
        errors.append(err.value)
        return 1  # retired
    for i, b in enumerate(bufs):
        h.aio_pwrite(b, i * n, done, flags=nbd.CMD_FLAG_FUA if i % 3 == 0 else 0)
        if i % 7 == 0:
            h.aio_flush(done)
    while h.aio_in_flight() > 0:
        h.poll(-1)
    assert len(errors) > count and not any(errors), errors
    for i, b in enumerate(bufs):
        assert h.pread(n, i * n) == b.to_bytearray(), i


if MODE == "structured":
    negotiation()
disk = connect("disk")
flags(disk)
content(disk)
allocation(disk)
errors()
parallel(disk)
disk.shutdown()
print("all right")
