package nbd

// limits is what a request is checked against.
type limits struct {
	size       int64
	readOnly   bool
	minBlock   uint32
	structured bool
	allocation bool // base:allocation was negotiated
	fastZero   bool
}

// check says whether a request may be handed to the device; if not, the
// answer. Order: what the command is, what it may do here, where it points.
func (l limits) check(r request) error {
	allowed, known := allowedFlags[r.cmd]
	if !known {
		return refuse(errInval, "%s is not supported", r.cmd)
	}
	if odd := r.flags &^ allowed; odd != 0 {
		return refuse(errInval, "%s with flags %#x", r.cmd, odd)
	}
	if r.mutates() && l.readOnly {
		return refuse(errPerm, "%s: the export is read-only", r.cmd)
	}
	if err := l.checkCommand(r); err != nil {
		return err
	}
	return l.checkRange(r)
}

func (l limits) checkCommand(r request) error {
	switch r.cmd {
	case cmdRead, cmdWrite:
		if r.length > MaxPayload {
			return refuse(errInval, "%s of %d bytes, at most %d are possible", r.cmd, r.length, MaxPayload)
		}
		if r.df() && !l.structured {
			return refuse(errInval, "%s with DF, but structured replies were not negotiated", r.cmd)
		}
	case cmdFlush:
		if r.offset != 0 || r.length != 0 {
			return refuse(errInval, "flush of a range")
		}
	case cmdZeroes:
		if r.flags&cmdFastZero != 0 && !l.fastZero {
			return refuse(errNotSup, "fast zeroing is not supported")
		}
	case cmdBlockStatus:
		if !l.allocation {
			return refuse(errInval, "block status without a negotiated context")
		}
		if r.length == 0 {
			return refuse(errInval, "block status of nothing")
		}
	}
	return nil
}

func (l limits) checkRange(r request) error {
	size := uint64(l.size)
	if r.offset > size || uint64(r.length) > size-r.offset {
		errno := errInval
		if r.cmd == cmdWrite || r.cmd == cmdZeroes {
			errno = errNoSpace
		}
		return refuse(errno, "%s of %d bytes at %d, the export has %d", r.cmd, r.length, r.offset, size)
	}
	if m := l.minBlock; m > 1 && (r.offset%uint64(m) != 0 || r.length%m != 0) {
		return refuse(errInval, "%s of %d bytes at %d, not in blocks of %d", r.cmd, r.length, r.offset, m)
	}
	return nil
}
