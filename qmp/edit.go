package qmp

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// maxXML bounds a definition, in bytes; libvirt's own limit is of that order.
const maxXML = 16 << 20

// span is a part of a document, in bytes.
type span struct{ from, to int }

func (s span) of(doc string) string { return doc[s.from:s.to] }

// elements finds the elements at a path of local names, the root's first, such as
// domain, devices, disk. Offsets are of the whole element.
func elements(doc string, path ...string) ([]span, error) {
	if len(doc) > maxXML {
		return nil, fmt.Errorf("a definition of %d bytes: at most %d are read", len(doc), maxXML)
	}
	var found []span
	var stack []string
	from := 0
	d := xml.NewDecoder(strings.NewReader(doc))
	for {
		at := int(d.InputOffset())
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			return found, nil
		} else if err != nil {
			return nil, fmt.Errorf("read the definition: %w", err)
		}
		switch t := t.(type) {
		case xml.StartElement:
			stack = append(stack, t.Name.Local)
			if slices.Equal(stack, path) {
				from = at
			}
		case xml.EndElement:
			if slices.Equal(stack, path) {
				found = append(found, span{from, int(d.InputOffset())})
			}
			stack = stack[:len(stack)-1]
		}
	}
}

// replace puts text in place of a span.
func replace(doc string, s span, text string) string {
	return doc[:s.from] + text + doc[s.to:]
}

// before is the span of no length just before the end tag of the element s.
func before(doc string, s span) (span, error) {
	i := strings.LastIndex(s.of(doc), "</")
	if i < 0 {
		return span{}, errors.New("an element without an end tag")
	}
	return span{s.from + i, s.from + i}, nil
}
