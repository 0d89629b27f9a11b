package config

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func TestEnvOverridesEveryScalar(t *testing.T) {
	for key, f := range scalars(reflect.TypeFor[Config](), "") {
		val := map[string]string{
			"site": "other", "state_dir": "/x/state", "run_dir": "/x/run", "listen": ":1", "metrics": ":2",
			"control.socket": "/x/c", "control.group": "wheel", "tls.ca": "/x/ca", "tls.cert": "/x/cert", "tls.key": "/x/key",
			"libvirt.uri": "qemu:///session", "libvirt.socket_group": "kvm", "libvirt.enabled": "false", "ext4.follow": "false", "ext4.local_flushes": "false", "verify.every": "24h", "verify.rate": "64MiB", "libvirt.emulation": "kvm",
			"limits.queue_bytes": "17MiB", "limits.inflight_bytes": "9MiB", "limits.spool_bytes": "3GiB", "limits.segment_bytes": "32MiB",
			"limits.active_log_bytes": "2GiB", "limits.backlog_bytes": "3GiB", "limits.resync_rate": "7MiB", "limits.epoch_bytes": "5MiB", "limits.apply_bytes": "65MiB",
			"limits.epoch_age": "3s", "limits.apply_age": "3s", "limits.heartbeat": "2s", "limits.link_timeout": "9s",
			"limits.reconnect_delay": "2h", "limits.compression": "none", "log.level": "warn", "log.format": "json",
		}[key]
		if val == "" {
			t.Errorf("no test value for %s", key)
			continue
		}
		env := map[string]string{EnvName(key): val}
		if key == "limits.active_log_bytes" {
			env["KAGAMI_LIMITS_SPOOL_BYTES"] = "4GiB"
		}
		c, err := parse("k.yaml", []byte(minimal), envOf(env))
		if err != nil {
			t.Errorf("%s: %v", EnvName(key), err)
			continue
		}
		got := lookup(reflect.ValueOf(*c), key)
		want, err := f.parse(val)
		if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: got %v, want %v (%v)", EnvName(key), got, want, err)
		}
		if def := lookup(reflect.ValueOf(*mustParse(t, minimal)), key); fmt.Sprint(def) == fmt.Sprint(want) {
			t.Errorf("%s: the test's value is the default", key)
		}
	}
}

// lookup finds a scalar by its key path.
func lookup(v reflect.Value, key string) any {
	head, rest, more := strings.Cut(key, ".")
	for _, f := range fieldsOf(v.Type()) {
		if f.key == head && more {
			return lookup(v.Field(f.index), rest)
		}
		if f.key == head {
			return v.Field(f.index).Interface()
		}
	}
	return nil
}

func TestEnvRefused(t *testing.T) {
	cases := []struct{ name, value, want string }{
		{"KAGAMI_SITE", "A", `environment KAGAMI_SITE: site: "A": allowed: ` + NameForm},
		{"KAGAMI_LIMITS_QUEUE_BYTES", "4", `environment KAGAMI_LIMITS_QUEUE_BYTES: limits.queue_bytes: "4": allowed: ` + sizeForm},
		{"KAGAMI_LIMITS_EPOCH_AGE", "4", `environment KAGAMI_LIMITS_EPOCH_AGE: limits.epoch_age: "4": allowed: a duration with its unit, such as 1s, 250ms or 1h`},
		{"KAGAMI_LIBVIRT_ENABLED", "1", `environment KAGAMI_LIBVIRT_ENABLED: libvirt.enabled: "1": allowed: true or false`},
		{"KAGAMI_LIBVIRT_EMULATION", "xen", `environment KAGAMI_LIBVIRT_EMULATION: libvirt.emulation: "xen": allowed: auto, kvm, qemu`},
	}
	for _, c := range cases {
		if got := problems(t, minimal, map[string]string{c.name: c.value}); !reflect.DeepEqual(got, []string{c.want}) {
			t.Errorf("got  %q\nwant %q", got, c.want)
		}
	}
	// A variable set to nothing is not set.
	if got := problems(t, minimal, map[string]string{"KAGAMI_SITE": ""}); got != nil {
		t.Errorf("empty variable: %q", got)
	}
}

func TestEnvNames(t *testing.T) {
	names := EnvNames()
	for _, want := range []string{"KAGAMI_SITE", "KAGAMI_STATE_DIR", "KAGAMI_CONTROL_SOCKET", "KAGAMI_TLS_CA", "KAGAMI_LIMITS_SPOOL_BYTES"} {
		if !slices.Contains(names, want) {
			t.Errorf("%s is missing in %q", want, names)
		}
	}
	if len(slices.Compact(slices.Clone(names))) != len(names) {
		t.Errorf("two keys share a variable: %q", names)
	}
	got := UnknownEnv([]string{"PATH=/bin", "KAGAMI_SITE=a", "KAGAMI_CONFIG=b", "KAGAMI_STIE=c", "KAGAMI_PEERS=d"})
	if want := []string{"KAGAMI_PEERS", "KAGAMI_STIE"}; !reflect.DeepEqual(got, want) {
		t.Errorf("unknown: %q", got)
	}
}
