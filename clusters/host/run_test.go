// SPDX-License-Identifier: Apache-2.0

package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCleanRemovesWhatACrashLeft(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	name := fmt.Sprintf("test-clean-%d", os.Getpid())
	r, err := New(name, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	dir, err := r.Memory("etcd")
	if err != nil {
		t.Fatal(err)
	}
	sleep, err := r.Start(Command{Name: "sleep", Argv: []string{"sleep", "600"}, Cgroup: r.Cgroup, Log: filepath.Join(t.TempDir(), "log")})
	if err != nil {
		t.Fatal(err)
	}
	var told []string
	report := func(line string) {
		if strings.HasPrefix(line, name+":") {
			told = append(told, line)
		}
	}
	if err := Clean(t.Context(), nil, report); err != nil {
		t.Fatal(err)
	}
	if len(told) != 1 || !strings.Contains(told[0], "left alone") {
		t.Errorf("clean said %q of a run that is alive", told)
	}
	if err := sleep.Err(); err != nil {
		t.Fatalf("clean ended a process of a run that is alive: %v", err)
	}

	// The state file now names a process that is gone: the same pid, started at another time.
	r.state.Owner.Start = "1"
	b, err := json.Marshal(r.state)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(r.stateFile(), b, 0o644); err != nil {
		t.Fatal(err)
	}
	told = nil
	if err := Clean(t.Context(), nil, report); err != nil {
		t.Fatal(err)
	}
	if len(told) != 1 || !strings.Contains(told[0], "removed") {
		t.Errorf("clean said %q of a run that is gone", told)
	}
	<-sleep.Done()
	for _, path := range []string{dir, r.Cgroup.Dir, r.stateFile()} {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}

func TestCleanRefusesForeignFolders(t *testing.T) {
	for _, s := range []state{
		{Cgroup: "/sys/fs/cgroup/system.slice"}, {Cgroup: "/"}, {Dirs: []string{"/home"}},
		{Dirs: []string{"/dev/shm/plimsoll-x/../../etc"}}, {Dirs: []string{"/dev/shm/other"}},
	} {
		if err := s.check(); err == nil {
			t.Errorf("a state file with %+v was taken", s)
		}
	}
}

// Who reads the output of a process that has ended is told how it ended.
func TestOutputEndsWithTheProcessEnd(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	r, err := New(fmt.Sprintf("test-output-%d", os.Getpid()), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	for _, test := range []struct{ script, want string }{
		{"echo a word; kill -KILL $$", "echo (sh -c echo a word; kill -KILL $$): signal: killed"},
		{"echo a word; echo no disk >&2; exit 3", "exit status 3; " + filepath.Join(r.Dir, "log") + " ends: no disk"},
	} {
		p, err := r.Start(Command{Name: "echo", Argv: []string{"sh", "-c", test.script}, Cgroup: r.Cgroup, Log: filepath.Join(r.Dir, "log"), Pipes: true})
		if err != nil {
			t.Fatal(err)
		}
		said, err := io.ReadAll(p.Stdout())
		if string(said) != "a word\n" || err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: read %q and %v, want %q", test.script, said, err, test.want)
		}
		if err := p.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
}
