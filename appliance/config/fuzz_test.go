package config

import (
	"reflect"
	"testing"
)

// FuzzParse: no file panics, and what is accepted can be written and read back.
func FuzzParse(f *testing.F) {
	for _, s := range []string{minimal, full, base, string(Example()), "site: &a a\nx: *a", "? {a: b}\n: c", "peers: [[[]]]"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parse("f.yaml", data, noEnv)
		if err != nil {
			return
		}
		out, err := c.YAML()
		if err != nil {
			t.Fatal(err)
		}
		again, err := parse("f.yaml", out, noEnv)
		if err != nil || !reflect.DeepEqual(c, again) {
			t.Fatalf("%v\n%s", err, out)
		}
	})
}
