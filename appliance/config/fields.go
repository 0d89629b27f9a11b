package config

import (
	"fmt"
	"reflect"
	"strings"
	"time"
)

// field is one key of a mapping in the file, as the struct tags declare it.
type field struct {
	key   string
	index int
	typ   reflect.Type
	size  bool // an int64 written with a unit
	min   string
	max   string
	oneof []string // allowed words, nil for any
}

var durationType = reflect.TypeFor[time.Duration]()

// fieldsOf lists the keys of struct type t.
func fieldsOf(t reflect.Type) []field {
	fs := make([]field, 0, t.NumField())
	for i := range t.NumField() {
		sf := t.Field(i)
		f := field{
			key: sf.Tag.Get("mapstructure"), index: i, typ: sf.Type,
			size: sf.Tag.Get("unit") == "size", min: sf.Tag.Get("min"), max: sf.Tag.Get("max"),
		}
		if s, ok := sf.Tag.Lookup("oneof"); ok {
			f.oneof = strings.Split(s, "|")
		}
		fs = append(fs, f)
	}
	return fs
}

// isScalar reports a key whose value is a single word in the file.
func (f field) isScalar() bool {
	switch f.typ.Kind() {
	case reflect.String, reflect.Bool, reflect.Int, reflect.Int64:
		return true
	}
	return false
}

// kind names the field's type in words.
func (f field) kind() string {
	switch {
	case f.typ == durationType:
		return "a duration such as 1s"
	case f.size:
		return sizeForm
	}
	switch f.typ.Kind() {
	case reflect.String:
		return "text"
	case reflect.Bool:
		return "true or false"
	case reflect.Int:
		return "a whole number"
	case reflect.Slice:
		return "a list"
	default:
		return "a mapping of keys"
	}
}

// parse reads the field's value from a scalar's text.
func (f field) parse(s string) (any, error) {
	switch {
	case f.typ == durationType:
		return parseDuration(s)
	case f.size:
		return ParseSize(s)
	}
	switch f.typ.Kind() {
	case reflect.Bool:
		return parseBool(s)
	case reflect.Int:
		n, err := parseInt(s)
		return int(n), err
	default:
		return s, nil
	}
}

// number reads a bound of the field's tags; a bound that does not parse is a
// mistake of this package, found by its tests.
func (f field) number(s string) (int64, error) {
	if f.typ == durationType {
		d, err := time.ParseDuration(s)
		return int64(d), err
	}
	var n int64
	_, err := fmt.Sscan(s, &n)
	return n, err
}

// format writes a number of the field as the file has it.
func (f field) format(n int64) string {
	switch {
	case f.typ == durationType:
		return FormatDuration(time.Duration(n))
	case f.size:
		return FormatSize(n)
	default:
		return fmt.Sprint(n)
	}
}

// inherit copies every limit that was not given from the file's limits.
func inherit(l *Limits, from Limits, given func(key string) bool) {
	dst, src := reflect.ValueOf(l).Elem(), reflect.ValueOf(from)
	for _, f := range fieldsOf(dst.Type()) {
		if !given(f.key) {
			dst.Field(f.index).Set(src.Field(f.index))
		}
	}
}

// at makes a key path: at("groups", 0, "name") is groups[0].name.
func at(parts ...any) string {
	var b strings.Builder
	for _, p := range parts {
		switch v := p.(type) {
		case int:
			fmt.Fprintf(&b, "[%d]", v)
		case string:
			if b.Len() > 0 && v != "" {
				b.WriteByte('.')
			}
			b.WriteString(v)
		}
	}
	return b.String()
}
