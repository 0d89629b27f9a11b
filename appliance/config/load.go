package config

import (
	"fmt"
	"io"
	"os"
	"reflect"
	"strings"

	"github.com/spf13/viper"
)

// maxFile bounds the file, in bytes.
const maxFile = 1 << 20

// delimiter of viper's keys: one that cannot be part of a key.
const delimiter = "\x00"

// Load reads the file at path, lets the environment override it, fills in the
// defaults and checks everything. The error is an *Error that names every
// problem at once, unless the file cannot be read.
func Load(path string) (*Config, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return parse(path, data, os.LookupEnv)
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("%s is larger than %s", path, FormatSize(maxFile))
	}
	return data, nil
}

func parse(file string, data []byte, lookup func(string) (string, bool)) (*Config, error) {
	r := newReader(file)
	values := r.read(data, reflect.TypeFor[Config]())
	c, err := merge(values, r.environment(lookup))
	if err != nil {
		return nil, fmt.Errorf("read configuration %s: %w", file, err)
	}
	r.refusePeerLimits(c)
	c.fill(func(path string) bool { return r.given(path) })
	for _, p := range validate(c) {
		if !r.complained(p.Key) {
			r.problems = append(r.problems, r.locate(p))
		}
	}
	if err := asError(r.problems); err != nil {
		return nil, err
	}
	return c, nil
}

// merge lays the file over the defaults and the environment over both. The
// values have their fields' types already: viper converts nothing.
func merge(file, env map[string]any) (*Config, error) {
	v := viper.NewWithOptions(viper.KeyDelimiter(delimiter))
	for key, val := range defaultValues(reflect.ValueOf(*Default()), "") {
		v.SetDefault(viperKey(key), val)
	}
	if err := v.MergeConfigMap(file); err != nil {
		return nil, err
	}
	for key, val := range env {
		v.Set(viperKey(key), val)
	}
	c := &Config{}
	return c, v.UnmarshalExact(c, viper.DecodeHook(nil))
}

func viperKey(path string) string { return strings.ReplaceAll(path, ".", delimiter) }

// defaultValues lists the scalar keys of a Config with their values.
func defaultValues(v reflect.Value, path string) map[string]any {
	out := map[string]any{}
	for _, f := range fieldsOf(v.Type()) {
		at := at(path, f.key)
		switch {
		case f.isScalar():
			out[at] = v.Field(f.index).Interface()
		case f.typ.Kind() == reflect.Struct:
			for k, x := range defaultValues(v.Field(f.index), at) {
				out[k] = x
			}
		}
	}
	return out
}

// given tells whether file or environment set a key.
func (r *reader) given(path string) bool {
	_, file := r.lines[path]
	_, env := r.env[path]
	return file || env
}

// complained tells whether something was said about the key or what it is in:
// what follows from a mistake is not reported as another one.
func (r *reader) complained(path string) bool {
	for ; path != ""; path = parent(path) {
		if r.bad[path] {
			return true
		}
	}
	return r.bad[""]
}

// locate adds to a problem where its key was set and what it was set to.
func (r *reader) locate(p Problem) Problem {
	p.Where = r.file
	if env, ok := r.env[p.Key]; ok {
		p.Where = "environment " + env
	} else {
		for path := p.Key; path != ""; path = parent(path) {
			if line, ok := r.lines[path]; ok {
				p.line = line
				p.Where = r.where(line)
				break
			}
		}
	}
	if v, ok := r.values[p.Key]; ok {
		p.Value = v
	}
	return p
}

// parent is the path of what holds a key; "" at the top.
func parent(path string) string {
	return path[:max(0, strings.LastIndexAny(path, ".["))]
}

// peerLimits are the limits of a peer's connections, which all groups share.
var peerLimits = []string{"inflight_bytes", "heartbeat", "link_timeout", "compression"}

// refusePeerLimits refuses limits of a group that belong to the peer.
func (r *reader) refusePeerLimits(c *Config) {
	for i := range c.Groups {
		for _, key := range peerLimits {
			path := at("groups", i, "limits", key)
			if line, ok := r.lines[path]; ok {
				r.fail(line, path, r.values[path], "not a group's: all groups share the peer's connections; set limits."+key)
			}
		}
	}
}
