// SPDX-License-Identifier: Apache-2.0

package results

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func mustCreate(tb testing.TB, dir string, env Environment, records []Record) {
	tb.Helper()
	w, err := Create(dir, env)
	if err != nil {
		tb.Fatal(err)
	}
	defer w.Close()
	for _, r := range records {
		if err := w.Append(r); err != nil {
			tb.Fatal(err)
		}
	}
	if err := w.Finish(env); err != nil {
		tb.Fatal(err)
	}
}

func mustRead(tb testing.TB, dir string) *Run {
	tb.Helper()
	r, err := Read(dir)
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

var oddRecords = []Record{
	{
		Scenario: "connect", Provider: "lab", Kernel: "6.18.5+deb13-amd64", Mode: "ebpf", Target: "tail", Services: 10000, Endpoints: 2, Round: 3,
		Count: 2000, Errors: 4, Values: []Value{{"p50", "ns", 16300}, {"p99", "ns", 25100.125}, {"cpu", "ns/op", 31000}, {"proxy-cpu", "ns", 0}, {"rss", "bytes", 1 << 40}, {"share", "fraction", 1.5e-7}},
		Warnings: []string{"other processes used 7 % of the CPU", "two\nlines and a \"quote\""},
	},
	{Scenario: "connect", Provider: "lab", Kernel: "6.18", Mode: "ipvs", Target: "tail", Services: 100, Endpoints: 2, Skipped: "this kernel has no ip_vs", Warnings: []string{"nor modules"}},
	{Scenario: "node-port", Provider: "lab", Kernel: "6.18", Mode: "nftables", Target: "pod", Services: 100, Endpoints: 2, Round: 9, Again: true, Count: 1, Values: []Value{{"p50", "ns", -1}}},
	{Scenario: "connect", Provider: "lab", Kernel: "6.18", Mode: "iptables", Target: "tail", Services: 0, Endpoints: 0, Errors: 2000},
}

func TestRecordsSurviveTheFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "some", "run")
	env := synthetic{seed: 1, ladder: []int{100}}.run().Environment
	mustCreate(t, dir, env, oddRecords)
	run := mustRead(t, dir)
	if diff := cmp.Diff(oddRecords, run.Records); diff != "" {
		t.Errorf("records differ (-written +read):\n%s", diff)
	}
	if diff := cmp.Diff(env, run.Environment); diff != "" {
		t.Errorf("environment differs (-written +read):\n%s", diff)
	}
	if len(run.Warnings) > 0 {
		t.Errorf("warnings about a whole file: %q", run.Warnings)
	}
}

func TestWriterKeepsWhatItHas(t *testing.T) {
	dir := t.TempDir()
	env := Environment{Run: "first"}
	w, err := Create(dir, env)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := w.Append(oddRecords[0]); err != nil {
		t.Fatal(err)
	}
	// Nobody called Finish: this is what a crash leaves.
	if got := mustRead(t, dir).Records; len(got) != 1 {
		t.Errorf("%d records before the run ends, want 1", len(got))
	}
	if _, err := Create(dir, env); err == nil || !strings.Contains(err.Error(), "holds a run already") {
		t.Errorf("a second run in the folder: %v", err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.Append(oddRecords[0]); err == nil {
		t.Error("a closed run takes records")
	}
}

// What is measured elsewhere goes on where a run ended, and adds what its own environment knows.
func TestExtend(t *testing.T) {
	dir := t.TempDir()
	if _, _, err := Extend(dir, Environment{}); err == nil || !strings.Contains(err.Error(), "holds no run") {
		t.Errorf("an empty folder is extended: %v", err)
	}
	w, err := Create(dir, Environment{Run: "first", Kernel: "6.18", Modes: []Mode{{Name: "direct", Doc: "one"}}, Plan: Plan{Scenarios: []string{"connect"}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Append(oddRecords[0]), w.Finish(Environment{Run: "first", Kernel: "6.18", Modes: []Mode{{Name: "direct", Doc: "one"}}, Plan: Plan{Scenarios: []string{"connect"}}, End: time.Now()})); err != nil {
		t.Fatal(err)
	}
	w, env, err := Extend(dir, Environment{
		Run: "second", Kernel: "6.12", Modes: []Mode{{Name: "direct", Doc: "another"}, {Name: "ipvs"}}, Plan: Plan{Scenarios: []string{"udp"}},
		Versions: map[string]string{"qemu": "7.2"}, Extra: map[string]string{"guests": "some"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if run := mustRead(t, dir); !run.Environment.End.IsZero() {
		t.Error("a run that goes on has ended")
	}
	env.End = time.Now()
	if err := errors.Join(w.Append(oddRecords[1]), w.Finish(env)); err != nil {
		t.Fatal(err)
	}
	run := mustRead(t, dir)
	e := run.Environment
	if len(run.Records) != 2 || e.Run != "first" || e.Kernel != "6.18" || len(e.Modes) != 2 || e.Modes[0].Doc != "one" || e.Versions["qemu"] != "7.2" ||
		e.Extra["guests"] != "some" || len(e.Plan.Scenarios) != 2 || e.End.IsZero() {
		t.Errorf("%d records, %+v", len(run.Records), e)
	}
}

func TestFullDisk(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip("no /dev/full")
	}
	w := &Writer{dir: t.TempDir(), file: full}
	defer w.Close()
	first := w.Append(oddRecords[0])
	if first == nil || !strings.Contains(first.Error(), "records cannot be kept") || !strings.Contains(first.Error(), "no space left") {
		t.Errorf("append to a full disk: %v", first)
	}
	if again := w.Append(oddRecords[0]); again != first {
		t.Errorf("second append: %v, want the first error", again)
	}
}

func TestAppendRefuses(t *testing.T) {
	good := Record{Scenario: "connect", Provider: "lab", Kernel: "6.18", Mode: "ebpf", Target: "tail"}
	for name, change := range map[string]func(*Record){
		"space in a mode":       func(r *Record) { r.Mode = "e bpf" },
		"slash in a target":     func(r *Record) { r.Target = "a/b" },
		"no kernel":             func(r *Record) { r.Kernel = "" },
		"capital scenario":      func(r *Record) { r.Scenario = "Connect" },
		"skip with values":      func(r *Record) { r.Skipped, r.Values = "no", []Value{{"p50", "ns", 1}} },
		"unit with a dash":      func(r *Record) { r.Values = []Value{{"p50", "n-s", 1}} },
		"value that is nothing": func(r *Record) { r.Values = []Value{{"p50", "ns", 0 / zero}} },
		"value twice":           func(r *Record) { r.Values = []Value{{"p50", "ns", 1}, {"p50", "ns", 2}} },
		"negative round":        func(r *Record) { r.Round = -1 },
		"endless warning":       func(r *Record) { r.Warnings = []string{strings.Repeat("x", 1<<16)} },
	} {
		r := good
		change(&r)
		if _, err := r.encode(); err == nil {
			t.Errorf("%s: written", name)
		}
	}
}

var zero float64

func TestReadTornFile(t *testing.T) {
	var whole []byte
	for _, r := range oddRecords {
		b, err := r.encode()
		if err != nil {
			t.Fatal(err)
		}
		whole = append(whole, b...)
	}
	full, _, err := decode(whole, "f")
	if err != nil {
		t.Fatal(err)
	}
	for cut := range whole {
		got, warnings, err := decode(whole[:cut], "f")
		if err != nil {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		for i, r := range got {
			if diff := cmp.Diff(full[i], r); diff != "" {
				t.Fatalf("cut at %d, record %d:\n%s", cut, i, diff)
			}
		}
		if cut > 0 && whole[cut-1] != '\n' && len(warnings) == 0 {
			t.Errorf("cut at %d within a line: no warning", cut)
		}
	}
}

func TestReadRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"no units":             "BenchmarkConnect/provider=lab 1 2\n",
		"foreign key":          "BenchmarkConnect/provider=lab/size=3 1 2 p50-ns\n",
		"services no number":   "BenchmarkConnect/provider=lab/services=many 1 2 p50-ns\n",
		"unit without metric":  "BenchmarkConnect/provider=lab/kernel=6/mode=m/target=t/services=1/endpoints=1/round=0 1 2 ns\n",
		"skip without quotes":  "# skip BenchmarkConnect/provider=lab why\n",
		"skip without a name":  "# skip \"why\"\n",
		"warning unterminated": "# warning BenchmarkConnect \"why\n",
	} {
		_, _, err := decode([]byte(text), "records.txt")
		if err == nil || !strings.Contains(err.Error(), "records.txt:1:") {
			t.Errorf("%s: error %v, want one that names records.txt:1", name, err)
		}
	}
}

func TestBenchstatReadsRecords(t *testing.T) {
	if testing.Short() {
		t.Skip("builds benchstat")
	}
	run := synthetic{seed: 1, ladder: []int{100, 1000}, rounds: 6, rho: .003, sigma: .01}.run()
	dir := t.TempDir()
	mustCreate(t, dir, run.Environment, append(run.Records, oddRecords...))
	cmd := exec.Command("go", "tool", "benchstat", "-filter", "/target:tail /services:1000 .unit:p50-ns", "-row", ".name,/services", "-col", "/mode@(direct ebpf)", filepath.Join(dir, RecordsFile))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, stderr.Bytes())
	}
	for _, want := range []string{"cpu: Example CPU @ 2.50GHz", "kubernetes: v1.36.3", "p50-sec", "direct", "ebpf", "16."} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("benchstat's output lacks %q", want)
		}
	}
	if stderr.Len() > 0 {
		t.Errorf("benchstat complains: %s", stderr.Bytes())
	}
	if t.Failed() {
		t.Logf("%s", out)
	}
}

func FuzzDecode(f *testing.F) {
	for _, r := range oddRecords {
		b, err := r.encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte("goos: linux\nUnit p50-ns better=lower\nBenchmarkConnect/provider=lab/kernel=6/mode=m/target=t/services=1/endpoints=1/round=0-8 1 2 p50-ns"))
	f.Fuzz(func(t *testing.T, b []byte) {
		records, _, err := decode(b, "f")
		if err != nil {
			return
		}
		// What was read can be written, and is read back as it was.
		var again []byte
		for _, r := range records {
			line, err := r.encode()
			if err != nil {
				t.Fatalf("read but cannot be written: %+v: %v", r, err)
			}
			again = append(again, line...)
		}
		got, warnings, err := decode(again, "f")
		if err != nil || len(warnings) > 0 {
			t.Fatalf("second reading: %v, %q", err, warnings)
		}
		if diff := cmp.Diff(records, got); diff != "" {
			t.Fatal(diff)
		}
	})
}
