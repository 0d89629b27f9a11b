package config

import (
	"fmt"
	"slices"
	"strings"
)

// Problem is one thing that is wrong with a configuration.
type Problem struct {
	Where string // file:line, or the environment variable; "" when neither
	Key   string // path of the key: groups[0].peer; "" for the file as a whole
	Value string // what was found, as written; "" when the key is missing
	What  string // what is wrong and what is allowed
	line  int
}

func (p Problem) String() string {
	var b strings.Builder
	if p.Where != "" {
		b.WriteString(p.Where + ": ")
	}
	if p.Key != "" {
		b.WriteString(p.Key + ": ")
	}
	if p.Value != "" {
		fmt.Fprintf(&b, "%q: ", shorten(p.Value))
	}
	b.WriteString(p.What)
	return b.String()
}

// shorten keeps a message readable when somebody pastes a certificate into a field.
func shorten(s string) string {
	const most = 120
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

// Error is everything that is wrong with a configuration, in the file's order.
type Error struct {
	Problems []Problem
}

func (e *Error) Error() string {
	if len(e.Problems) == 1 {
		return "configuration: " + e.Problems[0].String()
	}
	var b strings.Builder
	fmt.Fprintf(&b, "configuration: %d problems", len(e.Problems))
	for _, p := range e.Problems {
		b.WriteString("\n  " + p.String())
	}
	return b.String()
}

// asError makes an *Error of problems, or nil of none.
func asError(ps []Problem) error {
	if len(ps) == 0 {
		return nil
	}
	slices.SortStableFunc(ps, func(a, b Problem) int { return a.line - b.line })
	return &Error{Problems: ps}
}
