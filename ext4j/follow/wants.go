package follow

// wantKind says what a want is for.
type wantKind uint8

const (
	wantPage  wantKind = iota // key: page of the part
	wantLog                   // key: first block of the journal
	wantBlock                 // key: block whose home content the view needs
	wantCopy                  // key: block whose committed copy the view needs
)

type wantKey struct {
	kind wantKind
	key  uint64
}

// wants are the blocks that are asked for. They are bounded by what asks:
// pages of one reading, the prefetch of the log, one block for each lookup.
type wants struct {
	asked map[wantKey]bool // until loaded
	queue []wantKey        // not handed out yet
}

func (w *wants) reset() { w.asked, w.queue = map[wantKey]bool{}, nil }

// maxWants bounds what is asked for at a time, beyond what loading needs.
const maxWants = 1 << 13

// want asks for something, once.
func (p *part) want(kind wantKind, key uint64) {
	k := wantKey{kind, key}
	if p.wants.asked[k] || kind != wantPage && len(p.wants.asked) >= maxWants {
		return
	}
	p.wants.asked[k] = true
	p.wants.queue = append(p.wants.queue, k)
}

// maxWantBytes bounds one Want.
const maxWantBytes = 256 << 10

func (p *part) takeWants(out []Want, limit int) []Want {
	q := p.wants.queue
	for len(q) > 0 && len(out) < limit {
		w, ok := p.place(q[0])
		q = q[1:]
		if !ok {
			continue
		}
		for len(q) > 0 && w.kind == wantLog && q[0].kind == wantLog && w.Len+p.bs <= maxWantBytes {
			next, ok := p.place(q[0])
			if !ok || next.Off != w.end() || q[0].key != w.key+uint64(w.Len/p.bs) {
				break
			}
			w.Len += p.bs
			q = q[1:]
		}
		out = append(out, w)
	}
	p.wants.queue = q
	return out
}

// place says where on the disk a want lies.
func (p *part) place(k wantKey) (Want, bool) {
	w := Want{part: p, kind: k.kind, key: k.key, gen: p.gen}
	switch k.kind {
	case wantPage:
		w.Range = Range{int64(k.key) * pageSize, pageSize}
		w.Len = min(w.Len, p.at.Len-w.Off)
	case wantBlock:
		w.Range = Range{int64(k.key) * p.bs, p.bs}
	case wantCopy:
		c := p.log.copies[k.key]
		if c == nil {
			delete(p.wants.asked, k)
			return w, false
		}
		w.Range = Range{p.log.place(c.logical), p.bs}
	case wantLog:
		w.Range = Range{p.log.place(uint32(k.key)), p.bs}
	}
	if w.Off < 0 || w.Len <= 0 || w.Off > p.at.Len-w.Len {
		delete(p.wants.asked, k)
		return w, false
	}
	w.Off += p.at.Off
	return w, true
}

// loaded takes what a want asked for.
func (p *part) loaded(w Want, data []byte) {
	if int64(len(data)) != w.Len {
		p.giveUp("it cannot be read")
		return
	}
	switch w.kind {
	case wantPage:
		delete(p.wants.asked, wantKey{w.kind, w.key})
		p.pages.put(int64(w.key), data)
	case wantBlock:
		delete(p.wants.asked, wantKey{w.kind, w.key})
		if p.log.copies[w.key] == nil {
			p.cache.put(w.key, clone(data), false)
		}
	case wantCopy:
		delete(p.wants.asked, wantKey{w.kind, w.key})
		p.copyLoaded(w.key, clone(data))
	case wantLog:
		for i := int64(0); i < w.Len/p.bs; i++ {
			l := w.key + uint64(i)
			delete(p.wants.asked, wantKey{w.kind, l})
			p.log.loaded(uint32(l), data[i*p.bs:][:p.bs], p.ph == loadLog)
		}
		p.logLoaded()
		return
	}
	if p.ph != following {
		p.load()
	}
}

// logLoaded goes on parsing where a block was missing.
func (p *part) logLoaded() {
	switch p.ph {
	case loadLog:
		p.load()
	case following:
		if err := p.parse(); err != nil {
			p.unreadable(err)
			return
		}
	}
}

// copyLoaded brings back a committed copy that the cache had lost.
func (p *part) copyLoaded(b uint64, data []byte) {
	c := p.log.copies[b]
	if c == nil || p.cache.get(b) != nil {
		return
	}
	if c.escaped {
		be.PutUint32(data, 0xc03b3998)
	}
	if hashOf(data) == c.hash { // else the want was for an older one
		p.cache.put(b, data, true)
	}
}

func clone(b []byte) []byte { return append([]byte(nil), b...) }
