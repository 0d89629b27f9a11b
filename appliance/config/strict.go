package config

import (
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// reader turns a YAML document into exact values: every key known, every value
// of its field's type. What is wrong is noted and left out, so that the rest
// can still be judged.
type reader struct {
	file     string
	lines    map[string]int    // key path → line, for every key that is there
	values   map[string]string // key path → scalar as written
	env      map[string]string // key path → the variable that overrides it
	bad      map[string]bool   // key paths already complained about
	problems []Problem
}

func newReader(file string) *reader {
	return &reader{
		file: file, lines: map[string]int{}, values: map[string]string{},
		env: map[string]string{}, bad: map[string]bool{},
	}
}

// read parses data as a mapping of the keys of struct type t.
func (r *reader) read(data []byte, t reflect.Type) map[string]any {
	dec := yaml.NewDecoder(strings.NewReader(string(data)))
	var doc, more yaml.Node
	if err := dec.Decode(&doc); err != nil {
		if !errors.Is(err, io.EOF) {
			r.syntax(err)
		}
		return map[string]any{}
	}
	switch err := dec.Decode(&more); {
	case err == nil:
		r.note(more.Line, "", "", "a second document: the file must hold one")
	case !errors.Is(err, io.EOF):
		r.syntax(err)
	}
	if len(doc.Content) != 1 || isNull(doc.Content[0]) {
		return map[string]any{}
	}
	m, _ := r.mapping(doc.Content[0], t, "")
	return m
}

// syntax notes an error of the YAML parser, which names the line in its text.
func (r *reader) syntax(err error) {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	line := 0
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		if n, after, ok := strings.Cut(rest, ": "); ok {
			if l, err := strconv.Atoi(n); err == nil {
				line, text = l, after
			}
		}
	}
	r.fail(line, "", "", "not valid YAML: "+text)
}

// fail notes a problem that spoils the key's value: what follows from that is
// not reported. With key "" it spoils the whole file.
func (r *reader) fail(line int, key, value, what string) {
	r.bad[key] = true
	r.note(line, key, value, what)
}

func (r *reader) note(line int, key, value, what string) {
	r.problems = append(r.problems, Problem{Where: r.where(line), Key: key, Value: value, What: what, line: line})
}

func (r *reader) where(line int) string {
	if line == 0 {
		return r.file
	}
	return fmt.Sprintf("%s:%d", r.file, line)
}

// mapping reads a node of struct type t. It reports false when it is no mapping.
func (r *reader) mapping(n *yaml.Node, t reflect.Type, path string) (map[string]any, bool) {
	if n.Kind != yaml.MappingNode {
		r.mistyped(n, path, "a mapping of keys")
		return map[string]any{}, false
	}
	fields := fieldsOf(t)
	out := map[string]any{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, val := n.Content[i], n.Content[i+1]
		at := at(path, key.Value)
		f, ok := find(fields, key)
		if !ok {
			r.note(key.Line, at, "", "unknown key"+allowedKeys(fields, key.Value))
			continue
		}
		if first, dup := r.lines[at]; dup {
			r.fail(key.Line, at, "", fmt.Sprintf("given twice; first on line %d", first))
			continue
		}
		if isNull(val) {
			continue // an empty key is a key left out
		}
		r.lines[at] = key.Line
		if v, ok := r.value(val, f, at); ok {
			out[f.key] = v
		}
	}
	return out, true
}

func find(fields []field, key *yaml.Node) (field, bool) {
	for _, f := range fields {
		if key.Kind == yaml.ScalarNode && f.key == key.Value {
			return f, true
		}
	}
	return field{}, false
}

func (r *reader) value(n *yaml.Node, f field, path string) (any, bool) {
	switch {
	case f.isScalar():
		return r.scalar(n, f, path)
	case f.typ.Kind() == reflect.Slice:
		return r.list(n, f, path)
	case f.typ.Kind() == reflect.Pointer:
		return result(r.mapping(n, f.typ.Elem(), path))
	default:
		return result(r.mapping(n, f.typ, path))
	}
}

func result(m map[string]any, ok bool) (any, bool) { return m, ok }

func (r *reader) list(n *yaml.Node, f field, path string) (any, bool) {
	if n.Kind != yaml.SequenceNode {
		r.mistyped(n, path, "a list (lines that begin with \"- \")")
		return nil, false
	}
	out := []any{}
	for i, item := range n.Content {
		at := at(path, i)
		r.lines[at] = item.Line
		// An item that is no mapping stays in the list, empty, so that the
		// numbers of the others are those of the file.
		m, _ := r.mapping(item, f.typ.Elem(), at)
		out = append(out, m)
	}
	return out, true
}

func (r *reader) scalar(n *yaml.Node, f field, path string) (any, bool) {
	if n.Kind != yaml.ScalarNode {
		r.mistyped(n, path, f.kind())
		return nil, false
	}
	r.values[path] = n.Value
	if what := untyped(n, f); what != "" {
		r.fail(n.Line, path, n.Value, what)
		return nil, false
	}
	v, err := f.parse(n.Value)
	if err != nil {
		r.fail(n.Line, path, n.Value, err.Error())
		return nil, false
	}
	return v, true
}

// untyped says what is wrong with a scalar's YAML type, or "".
func untyped(n *yaml.Node, f field) string {
	tag := n.ShortTag()
	switch f.typ.Kind() {
	case reflect.Bool:
		if tag != "!!bool" {
			return "allowed: true or false, without quotes"
		}
	case reflect.Int:
		if tag != "!!int" {
			return "allowed: a whole number, without quotes"
		}
	case reflect.String:
		if tag != "!!str" {
			return "text is wanted here: put it in quotes"
		}
	case reflect.Int64:
		if tag != "!!str" && tag != "!!int" {
			return "allowed: " + f.kind()
		}
	}
	return ""
}

func (r *reader) mistyped(n *yaml.Node, path, want string) {
	what := want + " is wanted here"
	switch n.Kind {
	case yaml.AliasNode:
		what = "aliases (*name) are not supported: write the value out"
	case yaml.MappingNode:
		what += ", not a mapping"
	case yaml.SequenceNode:
		what += ", not a list"
	}
	value := ""
	if n.Kind == yaml.ScalarNode {
		value = n.Value
	}
	r.fail(n.Line, path, value, what)
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

// allowedKeys proposes the key that was probably meant, or lists all.
func allowedKeys(fields []field, got string) string {
	keys := make([]string, 0, len(fields))
	best, dist := "", 3
	for _, f := range fields {
		keys = append(keys, f.key)
		if d := distance(strings.ToLower(got), f.key); d < dist {
			best, dist = f.key, d
		}
	}
	if best != "" {
		return fmt.Sprintf("; did you mean %s?", best)
	}
	slices.Sort(keys)
	return "; allowed: " + strings.Join(keys, ", ")
}

// distance is the Levenshtein distance of two short words.
func distance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost++
			}
			diag = row[j+1]
			row[j+1] = min(cost, diag+1, row[j]+1)
		}
	}
	return row[len(b)]
}
