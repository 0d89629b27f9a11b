package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kagami/tests/dirty"
)

// dirtyFile writes an image with a journal to be replayed.
func dirtyFile(t *testing.T) string {
	t.Helper()
	img, err := dirty.Image()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, img, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestExt4Recover(t *testing.T) {
	path := dirtyFile(t)
	var text strings.Builder
	for _, args := range [][]string{
		{"--dry-run"},
		{"--out", path + ".out"},
		{"--out", path + ".out"},
		{"--partition", "1"},
		{"--partition", "1", "--offset", "512"},
		{"--offset", "4096"},
		{},
		{},
	} {
		r := kagami(t, append([]string{"ext4", "recover", path}, args...)...)
		text.WriteString("$ kagami ext4 recover IMAGE " + strings.Join(args, " ") + "\n" + r.err + r.out + "exit " + string(rune('0'+r.code)) + "\n\n")
	}
	golden(t, "ext4_recover.txt", strings.ReplaceAll(text.String(), path, "IMAGE"))
}

func TestExt4RecoverJSON(t *testing.T) {
	path := dirtyFile(t)
	r := kagami(t, "ext4", "recover", path, "--json")
	var got struct {
		Result struct {
			Needed       bool `json:"needed"`
			Transactions int  `json:"transactions"`
			Written      int  `json:"written"`
		} `json:"result"`
	}
	if err := json.Unmarshal([]byte(r.out), &got); err != nil || r.code != 0 {
		t.Fatalf("exit %d, %v\n%s%s", r.code, err, r.out, r.err)
	}
	if !got.Result.Needed || got.Result.Transactions == 0 || got.Result.Written == 0 {
		t.Errorf("got %s", r.out)
	}
	if r := kagami(t, "ext4", "recover", path+".none", "--json"); r.code != 5 || !strings.Contains(r.out, `"exit":5`) {
		t.Errorf("no image: exit %d, %s", r.code, r.out)
	}
}

func TestExt4InfoAndLog(t *testing.T) {
	path := dirtyFile(t)
	var text strings.Builder
	for _, args := range []string{"info", "log", "log --blocks", "info --partition 2"} {
		r := kagami(t, append([]string{"ext4"}, append(strings.Fields(args), path)...)...)
		text.WriteString("$ kagami ext4 " + args + " IMAGE\n" + r.err + r.out + "exit " + string(rune('0'+r.code)) + "\n\n")
	}
	golden(t, "ext4_info.txt", strings.ReplaceAll(text.String(), path, "IMAGE"))
	for _, args := range []string{"info", "log"} {
		r := kagami(t, "ext4", args, path, "--json")
		if !json.Valid([]byte(r.out)) || r.code != 0 {
			t.Errorf("%s: exit %d\n%s%s", args, r.code, r.out, r.err)
		}
	}
}

// TestExt4Files looks at the files of an image whose journal has to be replayed.
func TestExt4Files(t *testing.T) {
	path := dirtyFile(t)
	to := filepath.Join(t.TempDir(), "restored")
	var text strings.Builder
	for _, args := range [][]string{
		{"ls", path}, {"ls", path, "/", "-l"}, {"ls", path, "c2", "-l"}, {"ls", path, "/none"}, {"ls", path, "-R", "--json"},
		{"cat", path, "/none"}, {"cat", path, "/"}, {"cat", path},
		{"check", path},
		{"restore", path, "/", to}, {"restore", path, "/", to}, {"restore", path, "/none", to + "2"},
	} {
		r := kagami(t, append([]string{"ext4"}, args...)...)
		text.WriteString("$ kagami ext4 " + strings.Join(args, " ") + "\n" + r.err + r.out + "exit " + string(rune('0'+r.code)) + "\n\n")
	}
	golden(t, "ext4_files.txt", strings.NewReplacer(path, "IMAGE", to, "DESTINATION").Replace(text.String()))
	r := kagami(t, "ext4", "cat", path, "/a")
	if file, err := os.ReadFile(filepath.Join(to, "a")); err != nil || r.code != 0 || r.out != string(file) || len(file) == 0 {
		t.Errorf("cat: exit %d, %d bytes, restored %d, %v", r.code, len(r.out), len(file), err)
	}
}

// TestExt4Names: a guest's names do nothing to a terminal.
func TestExt4Names(t *testing.T) {
	for name, want := range map[string]string{"plain.txt": "plain.txt", "with space": "with space", "käse": "käse", "\x1b[2Jx": `"\x1b[2Jx"`, "a\nb": `"a\nb"`, "\xff": `"\xff"`} {
		if got := printable(name); got != want {
			t.Errorf("%q is printed as %s", name, got)
		}
	}
}
