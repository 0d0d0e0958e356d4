// SPDX-License-Identifier: Apache-2.0

// Package kindtest gives tests a container engine with a node image for kind.
package kindtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/plimsoll-bench/plimsoll/clusters/kind"
	"github.com/plimsoll-bench/plimsoll/clusters/kind/engine"
)

// Engine is a container engine with a node image: the one that answers, or one that program (bin/plimsoll) starts for the test and
// stops with it; cache is where the image lies. The test is skipped where there can be none.
func Engine(t *testing.T, program string) (e engine.Engine, cache string) {
	t.Helper()
	if testing.Short() {
		t.Skip("makes a kind cluster: not in -short")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	home, err := os.UserCacheDir()
	if err != nil {
		t.Skip(err)
	}
	cache = filepath.Join(home, "plimsoll")
	if _, err := kind.OwnArchive(cache); err != nil {
		t.Skip(err)
	}
	if e, err = engine.Find(t.Context()); err == nil {
		return e, cache
	}
	if out, err := exec.Command(program, "engine", "start", "--cache", cache).CombinedOutput(); err != nil {
		t.Skipf("no container engine can be had here: %s", out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command(program, "engine", "stop").CombinedOutput(); err != nil {
			t.Errorf("stop the engine: %v: %s", err, out)
		}
	})
	if e, err = engine.Find(t.Context()); err != nil {
		t.Fatal(err)
	}
	return e, cache
}
