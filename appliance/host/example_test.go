package host

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"kagami/appliance/config"
)

// TestExampleMakesAPair: the example, with site and peers filled in at both
// sites, gives two sites that are connected and raise no alarm. Beside these,
// only what two sites on one machine need is changed.
func TestExampleMakesAPair(t *testing.T) {
	p := newPair(t)
	for s, peer := range map[*site]*site{p.main: p.dr, p.dr: p.main} {
		text := string(config.Example())
		change := func(pattern, with string) {
			t.Helper()
			re := regexp.MustCompile(`(?m)^` + pattern + `$`)
			if len(re.FindAllString(text, -1)) != 1 {
				t.Fatalf("the example has no one line %q", pattern)
			}
			text = re.ReplaceAllLiteralString(text, with)
		}
		change(`site: primary`, "site: "+s.name)
		change(`  - name: dr`, "  - name: "+peer.name)
		change(`    address: dr\.example\.net:7400`, "    address: "+peer.address)
		change(`#state_dir: .*`, "state_dir: "+s.path("state"))
		change(`#run_dir: .*`, "run_dir: "+s.path(s.runDir))
		change(`#listen: .*`, `listen: "`+s.address+`"`)
		for _, file := range []string{"ca.crt", "site.crt", "site.key"} {
			key := map[string]string{"ca.crt": "ca", "site.crt": "cert", "site.key": "key"}[file]
			change(`#  `+key+`: .*`, "  "+key+": "+s.path("pki", file))
		}
		must(t, os.WriteFile(s.path("example.yaml"), []byte(text), 0o600))
		s.file = s.path("example.yaml")
	}
	p.up()
	for _, s := range []*site{p.main, p.dr} {
		st := s.status()
		if len(st.Groups) > 0 || !st.Peers[0].Connected {
			t.Errorf("%s: %+v", s.name, st)
		}
		if strings.Contains(s.log.String(), "level=ERROR") {
			t.Errorf("%s logs an error", s.name)
		}
	}
}
