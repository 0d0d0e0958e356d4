// SPDX-License-Identifier: Apache-2.0

// Package kindtest gives tests a container engine with a node image for kind.
package kindtest

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/plimsoll-bench/plimsoll/clusters/host"
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
	cache, err := host.CacheDir()
	if err != nil {
		t.Skip(err)
	}
	if _, err := kind.OwnArchive(cache); err != nil {
		t.Skip(err)
	}
	if e, err = engine.Find(t.Context()); err == nil {
		return e, cache
	}
	before := podmans(t)
	if out, err := exec.Command(program, "engine", "start", "--cache", cache).CombinedOutput(); err != nil {
		t.Skipf("no container engine can be had here: %s", out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command(program, "engine", "stop").CombinedOutput(); err != nil {
			t.Errorf("stop the engine: %v: %s", err, out)
		}
		if after := podmans(t); !slices.Equal(after, before) {
			t.Errorf("the engine leaves %q on the host, where there was %q", after, before)
		}
	})
	if e, err = engine.Find(t.Context()); err != nil {
		t.Fatal(err)
	}
	return e, cache
}

// podmans are the folder that podman keeps on a host and what lies below it, with its age.
func podmans(t *testing.T) (all []string) {
	t.Helper()
	const root = "/var/lib/containers"
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil {
			all = append(all, path+" of "+info.ModTime().String())
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return all
}
