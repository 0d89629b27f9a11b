package config

import (
	"reflect"
	"slices"
	"strings"
)

// EnvPrefix begins the name of every environment variable kagami reads.
const EnvPrefix = "KAGAMI_"

// EnvConfig names the configuration file for the command line.
const EnvConfig = EnvPrefix + "CONFIG"

// scalars lists the keys outside lists: those the environment can override.
func scalars(t reflect.Type, path string) map[string]field {
	out := map[string]field{}
	for _, f := range fieldsOf(t) {
		at := at(path, f.key)
		switch {
		case f.isScalar():
			out[at] = f
		case f.typ.Kind() == reflect.Struct:
			for k, v := range scalars(f.typ, at) {
				out[k] = v
			}
		}
	}
	return out
}

// EnvName is the variable that overrides a key: limits.spool_bytes is
// KAGAMI_LIMITS_SPOOL_BYTES.
func EnvName(key string) string {
	return EnvPrefix + strings.ToUpper(strings.ReplaceAll(key, ".", "_"))
}

// EnvNames lists every variable that overrides a key, sorted. Keys inside
// lists (peers, groups) have none.
func EnvNames() []string {
	var out []string
	for key := range scalars(reflect.TypeFor[Config](), "") {
		out = append(out, EnvName(key))
	}
	slices.Sort(out)
	return out
}

// UnknownEnv lists variables of environ (as os.Environ gives it) that look
// like overrides but are none: probably misspelt.
func UnknownEnv(environ []string) []string {
	known := append(EnvNames(), EnvConfig)
	var out []string
	for _, e := range environ {
		name, _, _ := strings.Cut(e, "=")
		if strings.HasPrefix(name, EnvPrefix) && !slices.Contains(known, name) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// environment reads the overrides. A variable that is set but empty counts as
// not set.
func (r *reader) environment(lookup func(string) (string, bool)) map[string]any {
	out := map[string]any{}
	for key, f := range scalars(reflect.TypeFor[Config](), "") {
		s, ok := lookup(EnvName(key))
		if !ok || s == "" {
			continue
		}
		r.env[key] = EnvName(key)
		r.values[key] = s
		v, err := f.parse(s)
		if err != nil {
			r.bad[key] = true
			r.problems = append(r.problems, Problem{Where: "environment " + EnvName(key), Key: key, Value: s, What: err.Error()})
			continue
		}
		out[key] = v
	}
	return out
}
