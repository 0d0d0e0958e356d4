// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/guest"
	"github.com/plimsoll-bench/plimsoll/results"
	"github.com/plimsoll-bench/plimsoll/scenarios"
)

// needsGuests skips where there is no QEMU, and returns the flags by which guests find this repository's programs.
func needsGuests(t *testing.T) []string {
	t.Helper()
	if testing.Short() {
		t.Skip("boots guests: not in -short")
	}
	if _, err := guest.QEMUVersion(t.Context()); errors.Is(err, clusters.ErrNotSupported) {
		t.Skipf("skipped: %v", err)
	}
	bin := needsLab(t)
	if _, err := os.Stat(filepath.Join(bin, "plimsoll")); err != nil {
		t.Skip("bin/plimsoll is not built: make build does it")
	}
	return []string{"--bin", bin, "--program", filepath.Join(bin, "plimsoll")}
}

// keepBusy keeps every processor busy until the test or stop ends it.
func keepBusy(t *testing.T) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var busy sync.WaitGroup
	for range runtime.NumCPU() {
		busy.Go(func() {
			for ctx.Err() == nil {
			}
		})
	}
	return func() { cancel(); busy.Wait() }
}

// The same seed gives the same records to the byte, however busy the host is; another seed others, hardly apart.
func TestGuestsRepeat(t *testing.T) {
	flags := needsGuests(t)
	count := func(seed string) string {
		t.Helper()
		dir := filepath.Join(t.TempDir(), "out")
		mustRun(t, append([]string{"run", "connect", "udp", "--provider", guestProvider, "--modes", "direct,ebpf", "--services", "10", "--rounds", "1", "--seed", seed, "--out", dir}, flags...)...)
		return dir
	}
	first := count("1")
	stop := keepBusy(t)
	second := count("1")
	stop()
	for _, name := range []string{results.RecordsFile, results.ResultsFile, scenarios.CountsFile} {
		want, err := os.ReadFile(filepath.Join(first, name))
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(second, name))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(want, got) {
			t.Errorf("%s differs:\n%s\nand with a busy host\n%s", name, want, got)
		}
	}
	run, err := results.Read(first)
	if err != nil {
		t.Fatal(err)
	}
	counted := 0
	for _, r := range run.Records {
		if r.Skipped != "" || r.Errors > 0 {
			t.Errorf("%s, %s %s: skipped %q, %d errors", r.Mode, r.Scenario, r.Target, r.Skipped, r.Errors)
		}
		for _, v := range r.Values {
			if v.Unit == "ns" {
				t.Errorf("%s, %s %s: %s in nanoseconds, of which a guest knows nothing", r.Mode, r.Scenario, r.Target, v.Metric)
			}
			if v.Metric == "p50" && v.Value > 10_000 && v.Value < 200_000 {
				counted++
			}
		}
	}
	if want := 3 * 5; counted != want { // direct, its twin, ebpf
		t.Errorf("%d medians, want %d", counted, want)
	}
}

// Where QEMU cannot be had each row says so, and the run is none that failed.
func TestWithoutQEMU(t *testing.T) {
	bin := needsLab(t)
	t.Setenv("PATH", "/nonexistent")
	dir := filepath.Join(t.TempDir(), "out")
	_, stderr := mustRun(t, "run", "connect", "--provider", guestProvider, "--modes", "ebpf", "--twin", "", "--services", "10,20", "--bin", bin, "--out", dir)
	if !strings.Contains(stderr, "no guests") {
		t.Errorf("no warning: %s", stderr)
	}
	run, err := results.Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(run.Records) != 2*2*5 { // rungs, rounds, targets with that of programming
		t.Errorf("%d records", len(run.Records))
	}
	for _, r := range run.Records {
		if !strings.Contains(r.Skipped, "qemu-system-x86_64") {
			t.Errorf("skipped: %q", r.Skipped)
		}
	}
}

// A kernel that was asked for and is none is an error.
func TestWrongKernel(t *testing.T) {
	err := run(t.Context(), io.Discard, io.Discard, append([]string{"run", "--provider", guestProvider, "--kernel", "/etc/passwd", "--out", filepath.Join(t.TempDir(), "out")}, needsGuests(t)...))
	if err == nil || !strings.Contains(err.Error(), "/etc/passwd") {
		t.Errorf("want an error that names it, got %v", err)
	}
}

// What connects take in each mode is what was accepted. A kernel, QEMU or recipe with which nothing was accepted is a warning with the new figures.
func TestAcceptedCounts(t *testing.T) {
	var stdout, stderr bytes.Buffer
	err := run(t.Context(), &stdout, &stderr, append([]string{"accept", "--check", "--file", filepath.Join("..", acceptedFile)}, needsGuests(t)...))
	for line := range strings.Lines(stderr.String()) {
		if strings.Contains(line, "warning") {
			t.Log(line)
		}
	}
	t.Log(stdout.String())
	if err != nil {
		t.Errorf("%v\n%s", err, stderr.String())
	}
}
