// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plimsoll-bench/plimsoll/clusters/kind"
	"github.com/plimsoll-bench/plimsoll/clusters/kind/engine"
	"github.com/plimsoll-bench/plimsoll/clusters/kind/kindtest"
)

// inEngine lists containers, networks and images of an engine, but for the node image, which stays.
func inEngine(t *testing.T, e engine.Engine) []string {
	t.Helper()
	var all []string
	for _, args := range [][]string{
		{"ps", "--all", "--format", "container {{.Names}}"},
		{"network", "ls", "--format", "network {{.Name}}"},
		{"images", "--format", "image {{.Repository}}:{{.Tag}}"},
	} {
		out, err := e.Command(t.Context(), args...).Output()
		if err != nil {
			t.Fatalf("%s: %v", strings.Join(args, " "), err)
		}
		for line := range strings.Lines(string(out)) {
			if !strings.HasPrefix(line, "image "+kind.OwnImage) {
				all = append(all, strings.TrimSpace(line))
			}
		}
	}
	return all
}

// What a run on kind makes goes with it when it is interrupted, and what kill -9 leaves plimsoll clean removes: while nodes are being
// made, and when they stand still between two visits.
func TestKindRunEndedEarlyLeavesNothing(t *testing.T) {
	needsLab(t) // for its programs: a run wants them with every provider
	program, err := filepath.Abs("../bin/plimsoll")
	if err != nil {
		t.Fatal(err)
	}
	e, _ := kindtest.Engine(t, program)
	onHost, before := leftovers(t, nil), inEngine(t, e)
	for _, test := range []struct {
		moment string // the run's line after which it ends
		nodes  bool   // and a node is there
		end    syscall.Signal
	}{
		{"building the image", false, syscall.SIGINT},
		{"creating cluster", true, syscall.SIGINT},
		{"creating cluster", true, syscall.SIGKILL},
		{"round 1 of", true, syscall.SIGKILL},
	} {
		t.Run(test.moment+", "+test.end.String(), func(t *testing.T) {
			cmd := exec.Command(program, "run", "--provider", "kind", "--node-image", kind.OwnImage, "--modes", "ebpf", "--twin", "",
				"--services", "5", "--rounds", "50", "--out", filepath.Join(t.TempDir(), "out"))
			stderr := startUntil(t, cmd, test.moment)
			said := make(chan []byte, 1)
			go func() {
				b, _ := io.ReadAll(stderr) // the process ends it
				said <- b
			}()
			tick := time.NewTicker(100 * time.Millisecond)
			defer tick.Stop()
			made := func(s string) bool { return strings.HasPrefix(s, "container ") && !slices.Contains(before, s) }
			for test.nodes && !slices.ContainsFunc(inEngine(t, e), made) {
				select {
				case rest := <-said:
					t.Fatalf("the run ended by itself: %v\n%s", cmd.Wait(), rest)
				case <-tick.C:
				}
			}
			if err := cmd.Process.Signal(test.end); err != nil {
				t.Fatal(err)
			}
			// Subtle: what the run has started may hold the pipe open, so its own end ends the reading.
			err := cmd.Wait()
			rest := <-said
			if err == nil {
				t.Errorf("the run ended with exit code 0:\n%s", rest)
			}
			if test.end == syscall.SIGKILL {
				if out, err := exec.Command(program, "clean").CombinedOutput(); err != nil {
					t.Errorf("plimsoll clean: %v: %s", err, out)
				}
			}
			if left := leftovers(t, onHost); len(left) > 0 {
				t.Errorf("left on the host: %v", left)
			}
			if left := slices.DeleteFunc(inEngine(t, e), func(s string) bool { return slices.Contains(before, s) }); len(left) > 0 {
				t.Errorf("left in the engine: %v\n%s", left, rest)
			}
		})
	}
}

// What kind wants and does not find is said in the last line, with what to do.
func TestKindSaysWhatIsMissing(t *testing.T) {
	needsLab(t)
	program, err := filepath.Abs("../bin/plimsoll")
	if err != nil {
		t.Fatal(err)
	}
	fails := func(want string, args ...string) {
		t.Helper()
		out, err := exec.Command(program, append([]string{"run", "--provider", "kind", "--out", filepath.Join(t.TempDir(), "out")}, args...)...).CombinedOutput()
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		if last := lines[len(lines)-1]; err == nil || !strings.Contains(last, want) {
			t.Errorf("the end is %v, want %q in the last line of:\n%s", err, want, out)
		}
	}
	if _, err := engine.Find(t.Context()); err != nil {
		fails("make kind-engine")
	}
	e, _ := kindtest.Engine(t, program)
	before := inEngine(t, e)
	fails("make node-image", "--node-image", kind.OwnImage, "--cache", t.TempDir())
	if after := inEngine(t, e); !slices.Equal(after, before) {
		t.Errorf("in the engine there was %v, now there is %v", before, after)
	}
}
