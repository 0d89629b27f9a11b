package follow

import (
	"io"
	"slices"
)

// pageSize is the unit in which the image is read before the block size is known, bytes.
const pageSize = 4096

// pages are the parts of the image that loading has read. They are kept true
// by write until they are reset.
type pages struct {
	m    map[int64]*[pageSize]byte
	lack map[int64]bool
}

func (p *pages) reset() { p.m, p.lack = map[int64]*[pageSize]byte{}, map[int64]bool{} }

// ReadAt reads what is there, and notes what is not (errMissing).
func (p *pages) ReadAt(b []byte, off int64) (int, error) {
	if off < 0 {
		return 0, io.ErrUnexpectedEOF
	}
	for n := 0; n < len(b); {
		at := off + int64(n)
		page := p.m[at/pageSize]
		k := min(pageSize-int(at%pageSize), len(b)-n)
		if page == nil {
			p.lack[at/pageSize] = true
		} else {
			copy(b[n:n+k], page[at%pageSize:])
		}
		n += k
	}
	if len(p.lack) > 0 {
		return 0, errMissing
	}
	return len(b), nil
}

// missing tells whether something was lacking since the last call of lacking.
func (p *pages) missing() bool { return len(p.lack) > 0 }

// lacking returns what was missing, and forgets it.
func (p *pages) lacking() []int64 {
	var out []int64
	for n := range p.lack {
		out = append(out, n)
	}
	clear(p.lack)
	slices.Sort(out)
	return out
}

func (p *pages) put(n int64, data []byte) {
	page := new([pageSize]byte)
	copy(page[:], data)
	p.m[n] = page
}

// write keeps the pages true, and tells whether one of them changed.
func (p *pages) write(w *Write) (changed bool) {
	if len(p.m) == 0 {
		return false
	}
	for o := w.Off; o < w.end(); {
		n := min(pageSize-o%pageSize, w.end()-o)
		if page := p.m[o/pageSize]; page != nil {
			data := zeros[:n]
			if w.Kind == Data {
				data = w.Data[o-w.Off:][:n]
			}
			to := page[o%pageSize:][:n]
			if string(to) != string(data) {
				copy(to, data)
				changed = true
			}
		}
		o += n
	}
	return changed
}

// view reads the file system as recovery would leave it: the committed copy of
// a block where the log has one, the image elsewhere.
type view struct{ p *part }

func (v view) ReadAt(b []byte, off int64) (int, error) {
	p := v.p
	if off < 0 {
		return 0, io.ErrUnexpectedEOF
	}
	var err error
	for n := 0; n < len(b); {
		at := off + int64(n)
		k := min(p.bs-at%p.bs, int64(len(b)-n))
		block := uint64(at / p.bs)
		if p.log.copies[block] == nil {
			if _, e := p.pages.ReadAt(b[n:n+int(k)], at); e != nil {
				err = e
			}
		} else if data := p.content(block); data != nil {
			copy(b[n:n+int(k)], data[at%p.bs:])
		} else {
			p.pages.lack[-1] = true // content has wanted it
			err = errMissing
		}
		n += int(k)
	}
	if err != nil {
		return 0, err
	}
	return len(b), nil
}
