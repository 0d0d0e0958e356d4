// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"image/png"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
	"github.com/plimsoll-bench/plimsoll/clusters/lab/labtest"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
	"github.com/plimsoll-bench/plimsoll/scenarios"
)

// TestMain makes the test binary the program that runs inside pods.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && slices.Contains([]string{"run", "agent", "status", scenarios.ServerCommand, scenarios.ClientCommand}, os.Args[1]) {
		main()
		return
	}
	lbtest.Main(m)
}

// mustRun runs the program and returns what it printed to standard output and to standard error.
func mustRun(t *testing.T, args ...string) (stdout, stderr string) {
	t.Helper()
	var out, complaints bytes.Buffer
	if err := run(t.Context(), &out, &complaints, args); err != nil {
		t.Fatalf("plimsoll %s: %v\n%s", strings.Join(args, " "), err, complaints.String())
	}
	return out.String(), complaints.String()
}

// needsLab skips where a lab cannot run and returns the folder of its programs.
func needsLab(t testing.TB) string {
	t.Helper()
	if testing.Short() {
		t.Skip("stands up a lab: not in -short")
	}
	return labtest.Bin(t, "../bin")
}

// leftovers lists what runs keep on the host, but for what is in before: runs of others may be there, and come to an end.
func leftovers(t *testing.T, before []string) []string {
	t.Helper()
	root, err := clusters.Cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, pattern := range []string{filepath.Join(root, "plimsoll-*"), "/dev/shm/plimsoll-*", filepath.Join(host.StateDir, "*")} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}
	return slices.DeleteFunc(all, func(path string) bool { return slices.Contains(before, path) })
}

// The main job in small: real API server, real kube-proxy, the real program, real packets.
func TestRunMeasuresEveryModeAndReports(t *testing.T) {
	bin := needsLab(t)
	before := leftovers(t, nil)
	dir := filepath.Join(t.TempDir(), "out")
	stdout, stderr := mustRun(t, "run", "--bin", bin, "--out", dir, "--services", "10,40", "--rounds", "6",
		"--connects", "40", "--paced-connects", "20")
	if want := filepath.Join(dir, "report.md") + "\n"; stdout != want {
		t.Errorf("standard output is %q, want the report's path %q", stdout, want)
	}
	if !strings.Contains(stderr, "results go to "+dir) {
		t.Errorf("standard error does not say where results go:\n%s", stderr)
	}

	rows := mustReadCSV(t, filepath.Join(dir, "results.csv"))
	if got, want := strings.Join(rows[0], ","), "provider,kernel,mode,scenario,target,services,endpoints,round,metric,unit,value,count,errors,note"; got != want {
		t.Errorf("results.csv begins with %s, want %s", got, want)
	}
	// A mode is either measured on every rung, target and round without an error, or skipped with its reason.
	measured, timed, skipped := map[string]int{}, map[string]int{}, map[string]string{}
	for _, row := range rows[1:] {
		mode, scenario, metric, value, errs, note := row[2], row[3], row[8], row[10], row[12], row[13]
		if strings.HasPrefix(note, "skipped: ") {
			skipped[mode] = note
			if value != "" {
				t.Errorf("a skipped row has a value: %v", row)
			}
			continue
		}
		if metric == "p50" && scenario != "programming" {
			timed[mode]++
		}
		// CPU is read at every visit; a latency is not, on a CPU that others keep busy.
		if metric == "cpu" && !strings.Contains(note, "again") {
			measured[mode]++
			if errs != "0" {
				t.Errorf("connects failed: %v", row)
			}
		}
	}
	for _, mode := range []string{"direct", "direct-twin", "direct-conntrack", "iptables", "iptables-legacy", "ipvs", "nftables", "ebpf"} {
		if want := 2 * 5 * 6; measured[mode] != want && skipped[mode] == "" {
			t.Errorf("%s: %d visits of a target, want %d or a reason", mode, measured[mode], want)
		}
		if timed[mode] == 0 && skipped[mode] == "" {
			t.Errorf("%s: not one latency", mode)
		}
		if skipped[mode] != "" {
			t.Logf("%s: %s", mode, skipped[mode])
		}
	}
	for _, name := range []string{"connect-tail.png", "tax.png"} {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
			continue
		}
		if _, err := png.DecodeConfig(f); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		f.Close()
	}
	for _, name := range []string{"verdicts.csv", "crossovers.csv", "report.md", "environment.json", "records.txt", "log.txt", scenarios.SamplesFile, "logs/iptables/kube-proxy.yaml"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Size() == 0 {
			t.Errorf("%s is missing or empty: %v", name, err)
		}
	}
	if left := leftovers(t, before); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}

	// The report can be made again from the records alone, to the byte.
	first, err := os.ReadFile(filepath.Join(dir, "results.csv"))
	if err != nil {
		t.Fatal(err)
	}
	mustRun(t, "report", dir)
	if stdout, _ := mustRun(t, "compare", dir, dir); stdout == "" {
		t.Error("plimsoll compare says nothing")
	}
	if again, err := os.ReadFile(filepath.Join(dir, "results.csv")); err != nil || !bytes.Equal(first, again) {
		t.Errorf("plimsoll report renders other results: %v", err)
	}
}

// watchedWriter calls f when what was written first matches.
type watchedWriter struct {
	bytes.Buffer
	match *regexp.Regexp
	f     func()
}

func (w *watchedWriter) Write(p []byte) (int, error) {
	n, err := w.Buffer.Write(p)
	if w.f != nil && w.match.Match(w.Bytes()) {
		w.f()
		w.f = nil
	}
	return n, err
}

// laterRound is any round but the first: a pipe is told of one in ten seconds.
const laterRound = "round ([2-9]|[1-9][0-9]) of"

// An interrupt leaves what was measured, with a report, and nothing on the host, at whatever moment it comes.
func TestInterruptLeavesResultsAndNothingElse(t *testing.T) {
	bin := needsLab(t)
	for _, moment := range []string{"starting etcd", "starting the proxies", "writing Services", laterRound} {
		t.Run(moment, func(t *testing.T) {
			before := leftovers(t, nil)
			dir := filepath.Join(t.TempDir(), "out")
			ctx, cancel := context.WithCancelCause(t.Context())
			stderr := &watchedWriter{match: regexp.MustCompile(moment), f: func() { cancel(errInterrupted) }}
			err := run(ctx, &bytes.Buffer{}, stderr, []string{"run", "--bin", bin, "--out", dir, "--modes", "direct,ebpf", "--services", "5",
				"--rounds", "50"})
			if !errors.Is(err, errInterrupted) && !errors.Is(err, context.Canceled) {
				t.Errorf("the error does not say that the run was interrupted: %v", err)
			}
			if left := leftovers(t, before); len(left) > 0 {
				t.Errorf("left on the host: %v", left)
			}
			if moment == laterRound {
				if _, err := os.Stat(filepath.Join(dir, "report.md")); err != nil {
					t.Errorf("no report of what was measured: %v", err)
				}
			}
		})
	}
}

// startUntil starts a run and waits for the line of it that has moment in it. It returns what comes after.
func startUntil(t *testing.T, cmd *exec.Cmd, moment string) io.Reader {
	t.Helper()
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stderr)
	for lines.Scan() && !strings.Contains(lines.Text(), moment) {
	}
	if err := lines.Err(); err != nil {
		t.Error(err)
	}
	return stderr
}

// What kill -9 leaves, plimsoll clean removes, at whatever moment it comes.
func TestCleanAfterKill(t *testing.T) {
	bin := needsLab(t)
	before := leftovers(t, nil)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "run", "--bin", bin, "--out", filepath.Join(t.TempDir(), "out"), "--modes", "direct,nftables", "--services", "5", "--rounds", "50")
	// In the middle of a round, when sites are frozen.
	startUntil(t, cmd, "round 1")
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	if len(leftovers(t, before)) == 0 {
		t.Error("the run left nothing although it was killed: this test tests nothing")
	}
	mustRun(t, "clean")
	if left := leftovers(t, before); len(left) > 0 {
		t.Errorf("left on the host after clean: %v", left)
	}
}

func TestWrongFlagsSayWhatToDo(t *testing.T) {
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "x"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	// Binaries that exist, so that the flag is what is wrong.
	bin := t.TempDir()
	for _, name := range []string{"etcd", "kube-apiserver", "kube-proxy"} {
		if err := os.WriteFile(filepath.Join(bin, name), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"nosuch"}, "unknown command"},
		{[]string{"run", "--nosuch"}, "unknown flag"},
		{[]string{"run", "--rounds", "3"}, "at least 6"},
		{[]string{"run", "--profile", "slow"}, "quick, default, full"},
		{[]string{"run", "--services", "1000,100"}, "ascending"},
		{[]string{"run", "--services", "100,100"}, "ascending"},
		{[]string{"run", "--services", "0,100"}, "ascending"},
		{[]string{"run", "--services", "70000"}, "65000"},
		{[]string{"run", "--endpoints", "0"}, "at least 1"},
		{[]string{"run", "--patience", "-1s"}, "above 0"},
		{[]string{"run", "--modes", "iptable"}, "iptables-legacy"},
		{[]string{"run", "--modes", "ebpf,ebpf"}, "twice"},
		{[]string{"e2e", "--modes", "ebpf,ebpf"}, "twice"},
		{[]string{"e2e", "--modes", "direct"}, "nothing carries Services"},
		{[]string{"e2e", "--families", "ipv5"}, "[ipv4 ipv6 dual]"},
		{[]string{"e2e", "--families", ""}, "at least one"},
		{[]string{"e2e", "--runs", "0"}, "at least 1"},
		{[]string{"run", "--twin", "ipvs", "--modes", "ebpf"}, "not among"},
		{[]string{"run", "--provider", "moon"}, "lab"},
		{[]string{"run", "--out", full}, "not empty"},
		{[]string{"run", "nosuch"}, "connect, tax"},
		{[]string{"run", "--bin", "/nonexistent"}, "make build"},
		{[]string{"report"}, "arg"},
		{[]string{"report", "/nonexistent"}, "no run"},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			args := test.args
			if args[0] == "run" && !slices.Contains(args, "--bin") {
				args = append(slices.Clone(args), "--bin", bin)
			}
			if args[0] == "run" && !slices.Contains(args, "--out") {
				args = append(slices.Clone(args), "--out", filepath.Join(t.TempDir(), "out"))
			}
			err := run(t.Context(), &bytes.Buffer{}, &bytes.Buffer{}, args)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("the error is %v, want one that says %q", err, test.want)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("the error has more than one line: %v", err)
			}
		})
	}
}

func TestListNamesEverything(t *testing.T) {
	stdout, _ := mustRun(t, "list")
	for _, word := range []string{"iptables-legacy", "connect", "tax", "p50-ns", "cpu-ns/op", "lab"} {
		if !strings.Contains(stdout, fmt.Sprintf("  %s ", word)) {
			t.Errorf("list does not name %s:\n%s", word, stdout)
		}
	}
}

// mustReadCSV returns a table's rows, its head among them.
func mustReadCSV(t *testing.T, file string) [][]string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	return rows
}
