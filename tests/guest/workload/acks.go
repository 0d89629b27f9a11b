package workload

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
)

// Acks is what a guest's console says was acknowledged.
type Acks struct {
	Append, Blocks uint64
	Errors         []string // the ERR lines
}

// ReadAcks reads acknowledgement lines. A last line without its end is not
// counted, nor is any line of another kind.
func ReadAcks(r io.Reader) (Acks, error) {
	var a Acks
	br := bufio.NewReader(r)
	for {
		l, err := br.ReadString('\n')
		if err == io.EOF {
			return a, nil
		} else if err != nil {
			return a, fmt.Errorf("read acknowledgements: %w", err)
		}
		a.add(strings.TrimRight(l, "\r\n"))
	}
}

func (a *Acks) add(l string) {
	if strings.HasPrefix(l, "ERR ") {
		a.Errors = append(a.Errors, l)
		return
	}
	var f byte
	var n uint64
	if k, _ := fmt.Sscanf(l, "ACK %c %d", &f, &n); k != 2 {
		return
	}
	switch File(f) {
	case Append:
		a.Append = max(a.Append, n)
	case Blocks:
		a.Blocks = max(a.Blocks, n)
	}
}

// ReadAcksFile is ReadAcks on a file.
func ReadAcksFile(path string) (Acks, error) {
	f, err := os.Open(path)
	if err != nil {
		return Acks{}, err
	}
	defer f.Close()
	return ReadAcks(f)
}

// Lost is how many acknowledged records of each file a report lacks.
func (a Acks) Lost(r Report) (appended, blocks uint64) {
	if a.Append > r.Append.Highest {
		appended = a.Append - r.Append.Highest
	}
	if a.Blocks > r.Blocks.Highest {
		blocks = a.Blocks - r.Blocks.Highest
	}
	return appended, blocks
}
