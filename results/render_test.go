// SPDX-License-Identifier: Apache-2.0

package results

import (
	"bytes"
	"encoding/csv"
	"flag"
	"fmt"
	"image/png"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"
)

var update = flag.Bool("update", false, "rewrite testdata")

func mustRender(tb testing.TB, r *Run) (dir string) {
	tb.Helper()
	dir = tb.TempDir()
	if err := r.Render(dir); err != nil {
		tb.Fatal(err)
	}
	return dir
}

func mustFile(tb testing.TB, dir, name string) string {
	tb.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		tb.Fatal(err)
	}
	return string(b)
}

// keep drops the records and values that f does not want.
func keep(r *Run, f func(Record, Value) bool) *Run {
	var out []Record
	for _, rec := range r.Records {
		rec.Values = slices.DeleteFunc(slices.Clone(rec.Values), func(v Value) bool { return !f(rec, v) })
		if len(rec.Values) > 0 || rec.Skipped != "" && f(rec, Value{Metric: "p50", Unit: "ns"}) {
			out = append(out, rec)
		}
	}
	return &Run{Environment: r.Environment, Records: out, Warnings: r.Warnings}
}

// small is a whole run in few records: the chain's tail, a pod's own address, and programming.
func small(seed uint64) *Run {
	run := synthetic{seed: seed, ladder: sixRungs, rounds: 6, rho: 0.003, sigma: 0.007}.run()
	return keep(run, func(r Record, v Value) bool {
		return r.Scenario == "programming" || !slices.Contains([]string{"p90", "p99", "max", "mean"}, v.Metric) && (r.Target == "tail" || r.Target == "pod" && v.Metric == "p50")
	})
}

func TestGolden(t *testing.T) {
	dir := mustRender(t, small(1))
	var got txtar.Archive
	got.Comment = []byte("What Render writes for a synthetic run: iptables pays 15 ns and iptables-legacy 2.7 ns per Service, nftables and ebpf nothing.\nRewrite with go test -update.\n\n")
	for _, name := range []string{ReportFile, VerdictsFile, CrossoversFile, ResultsFile} {
		text := mustFile(t, dir, name)
		if name == ResultsFile { // its head is enough: one row is like the other
			text = strings.Join(strings.SplitAfter(text, "\n")[:24], "")
		}
		got.Files = append(got.Files, txtar.File{Name: name, Data: []byte(text)})
	}
	file := filepath.Join("testdata", "small.txtar")
	if *update {
		if err := os.WriteFile(file, txtar.Format(&got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(txtar.Format(want)), string(txtar.Format(&got))); diff != "" {
		t.Errorf("rendered files differ (-want +got):\n%s", diff)
	}
}

func TestRenderIsRepeatable(t *testing.T) {
	run := small(2)
	first := mustRender(t, run)
	// A second rendering, of what was written and read back, into a folder that has a run's files already.
	second := t.TempDir()
	mustCreate(t, second, run.Environment, run.Records)
	for range 2 {
		if err := mustRead(t, second).Render(second); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := os.ReadDir(first)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
		if mustFile(t, first, e.Name()) != mustFile(t, second, e.Name()) {
			t.Errorf("%s differs from one rendering to the next", e.Name())
		}
	}
	for _, want := range []string{"connect-tail.png", "connect-cpu.png", "tax.png", "programming.png", "programming-proxy-rss.png", ReportFile} {
		if !slices.Contains(names, want) {
			t.Errorf("no %s in %v", want, names)
		}
	}
	if entries, _ := filepath.Glob(filepath.Join(second, ".*")); len(entries) > 0 {
		t.Errorf("left behind: %v", entries)
	}
}

// Pictures of a former rendering go with the report that showed them; what others put beside them stays.
func TestRenderRemovesFormerPictures(t *testing.T) {
	run := small(1)
	dir := mustRender(t, run)
	gone := []string{"tax.png"}
	foreign := []string{"tax-mine.png", "tax-cpu.png", "mine.png", "sub/tax.png", "notes.md", "log.txt"}
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range foreign {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("mine"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// Somebody wrote into the report what it does not show by itself.
	report := mustFile(t, dir, ReportFile) + "![tax-mine.png](tax-mine.png)\n![mine](mine.png)\n![Mine by number of Services (µs)](sub/tax.png)\n"
	if err := os.WriteFile(filepath.Join(dir, ReportFile), []byte(report), 0o644); err != nil {
		t.Fatal(err)
	}
	less := keep(run, func(r Record, _ Value) bool { return r.Scenario != "tax" })
	if err := less.Render(dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range gone {
		if _, err := os.Stat(filepath.Join(dir, name)); !os.IsNotExist(err) {
			t.Errorf("%s, which the new report does not show, is still there (%v)", name, err)
		}
	}
	for _, name := range foreign {
		if mustFile(t, dir, name) != "mine" {
			t.Errorf("%s was touched", name)
		}
	}
	for _, name := range []string{"connect-tail.png", "programming.png"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Errorf("a picture of the new report is gone: %v", err)
		}
	}
}

func TestPictures(t *testing.T) {
	run := synthetic{seed: 1, ladder: sixRungs, rounds: 6, rho: 0.003, sigma: 0.007}.run()
	dir := mustRender(t, run)
	names, err := filepath.Glob(filepath.Join(dir, "*.png"))
	if err != nil {
		t.Fatal(err)
	}
	report := mustFile(t, dir, ReportFile)
	for _, name := range names {
		img, err := png.Decode(strings.NewReader(mustFile(t, dir, filepath.Base(name))))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if w := img.Bounds().Dx(); w != 1600 {
			t.Errorf("%s is %d pixels wide, want 1600", name, w)
		}
		if !strings.Contains(report, "("+filepath.Base(name)+")") {
			t.Errorf("the report does not show %s", filepath.Base(name))
		}
	}
	for i := range names {
		names[i] = filepath.Base(names[i])
	}
	want := []string{"connect-cpu.png", "connect-p99.png", "connect-tail.png", "connect.png", "programming-proxy-rss.png", "programming.png", "tax-cpu.png", "tax.png"}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Errorf("pictures (-want +got):\n%s", diff)
	}
}

func TestPicturesOfLittle(t *testing.T) {
	for name, run := range map[string]*Run{
		"one rung, one round": synthetic{seed: 1, ladder: []int{100}, rounds: 1}.run(),
		"no record":           {},
		"nothing but a skip":  {Records: []Record{oddRecords[1]}},
		"no Service":          {Records: []Record{oddRecords[3]}},
		"zeros": {Records: []Record{{Scenario: "tax", Provider: "lab", Kernel: "6", Mode: "m", Target: "pod", Services: 0, Values: []Value{{"cpu", "ns/op", 0}}},
			{Scenario: "tax", Provider: "lab", Kernel: "6", Mode: "m", Target: "pod", Services: 10, Values: []Value{{"cpu", "ns/op", 0}}}}},
		"below zero": {Records: []Record{{Scenario: "tax", Provider: "lab", Kernel: "6", Mode: "m", Target: "pod", Services: 10, Values: []Value{{"p50", "ns", -5}}}}},
	} {
		t.Run(name, func(t *testing.T) {
			report := mustFile(t, mustRender(t, run), ReportFile)
			if name == "nothing but a skip" && !strings.Contains(report, "skipped: this kernel has no ip_vs") {
				t.Errorf("the skip is not in the report:\n%s", report)
			}
			if strings.Contains(report, "NaN") || strings.Contains(report, "Inf") {
				t.Errorf("the report speaks of NaN or Inf:\n%s", report)
			}
		})
	}
}

func TestVerdicts(t *testing.T) {
	run := synthetic{seed: 3, ladder: sixRungs, rounds: 10, rho: 0.003, sigma: 0.007}.run()
	got := map[string]Verdict{}
	for _, v := range run.Verdicts() {
		got[v.Scenario+" "+v.Target+" "+v.Metric+" "+v.Mode] = v
	}
	for name, want := range map[string]Model{
		"connect tail p50 iptables":              Linear,
		"connect middle p50 iptables":            Linear,
		"connect head p50 iptables":              Constant,
		"connect tail p50 iptables-legacy":       Linear,
		"connect tail p50 nftables":              Constant,
		"connect tail p50 ebpf":                  Constant,
		"connect random p50 ebpf":                Constant,
		"connect tail p50 direct":                Constant,
		"connect tail p50 direct-conntrack":      Constant,
		"connect tail p50 ipvs":                  Undecided,
		"connect tail cpu iptables":              Linear,
		"tax pod p50 iptables":                   Linear,
		"tax pod p50 ebpf":                       Constant,
		"programming fleet programming nftables": Undecided,
	} {
		if got[name].Model != want {
			t.Errorf("%s is %q, want %s (%+v)", name, got[name].Model, want, got[name])
		}
	}
	if v := got["connect tail p50 iptables"]; !(v.Low < 15 && 15 < v.High && v.High-v.Low < 1) {
		t.Errorf("iptables pays %.2f (%.2f to %.2f) ns per Service, want 15", v.Slope, v.Low, v.High)
	}
	if v := got["connect tail p50 ebpf"]; !(v.High < 0.02) || v.FloorMode != "direct" {
		t.Errorf("ebpf pays up to %.3f ns per Service above %q", v.High, v.FloorMode)
	}
	if v := got["connect tail p50 ipvs"]; !strings.Contains(v.Note, "this kernel has no ip_vs") || v.Points != 0 {
		t.Errorf("ipvs: %+v, want the reason of its skip", v)
	}
	for _, r := range got["connect tail p50 iptables"].Ratios {
		want := map[string]float64{"direct": 172000. / 16000, "direct-conntrack": 172000. / 19400}[r.Floor]
		if r.Value < 0.97*want || r.Value > 1.03*want || !r.Differs {
			t.Errorf("iptables at 10,000 ÷ %s: %+v, want %.2f", r.Floor, r, want)
		}
	}
	if _, ok := got["connect tail p50 direct-twin"]; ok {
		t.Error("the twin has a verdict")
	}
}

func TestNoTwinInRun(t *testing.T) {
	run := keep(small(1), func(r Record, _ Value) bool { return r.Mode != "direct-twin" })
	run.Environment.Modes = slices.DeleteFunc(slices.Clone(run.Environment.Modes), func(m Mode) bool { return m.Twin != "" })
	for _, v := range run.Verdicts() {
		if v.Model != Undecided || v.Grows || !strings.Contains(v.Note, "A/A") && !strings.Contains(v.Note, "skipped") && v.Scenario != "programming" {
			t.Errorf("%s %s %s: %s, %q", v.Mode, v.Target, v.Metric, v.Model, v.Note)
		}
	}
	for _, c := range run.Crossovers() {
		if c.Services == c.Services {
			t.Errorf("crossover without a noise floor: %+v", c)
		}
	}
}

func TestCrossovers(t *testing.T) {
	run := synthetic{seed: 3, ladder: sixRungs, rounds: 10, rho: 0.003, sigma: 0.007}.run()
	found := map[string]Crossover{}
	for _, c := range run.Crossovers() {
		if strings.Contains(c.ModeA+c.ModeB, "twin") {
			t.Errorf("crossover of a twin: %+v", c)
		}
		if c.Metric == "p50" {
			found[c.Target+" "+c.ModeA+" "+c.ModeB] = c
		}
	}
	// 20.5 + 0.0027 n = 23.6 µs
	if c := found["tail iptables-legacy nftables"]; !(c.Low <= 1148 && 1148 <= c.High && c.High-c.Low < 500) {
		t.Errorf("iptables-legacy crosses nftables at %.0f (%.0f to %.0f), want 1148", c.Services, c.Low, c.High)
	}
	for _, name := range []string{"tail nftables iptables-legacy", "tail iptables ebpf", "head iptables nftables", "tail ebpf direct"} {
		c, ok := found[name]
		if !ok || c.Services == c.Services {
			t.Errorf("%s: %+v, want an entry that says that they do not cross", name, c)
		}
	}
}

func TestReportHidesNothing(t *testing.T) {
	s := synthetic{seed: 1, ladder: sixRungs, rounds: 6, rho: 0.003, sigma: 0.003, drift: 0.1}
	run := s.run()
	run.Environment.End = time.Time{}
	run.Warnings = []string{"records.txt ends within a line"}
	run.Records = append(run.Records, run.Records[0])
	dir := mustRender(t, run)
	report := mustFile(t, dir, ReportFile)
	for _, want := range []string{
		"This run did not finish", "records.txt ends within a line", "skipped: not programmed in 5m0s", "skipped: this kernel has no ip_vs",
		"other processes used 7 % of the CPU", "6 errors in", "9 values stand twice", "**Warning:** connect p50: ", "plimsoll run connect tax programming --out 'a folder'",
		"Every new connection on an iptables node pays",
	} {
		if !strings.Contains(report, want) {
			t.Errorf("the report does not say %q", want)
		}
	}
	if strings.Contains(report, "Every new connection on an ebpf node pays") {
		t.Error("the report says of ebpf what is not so")
	}
	for _, line := range strings.Split(report, "\n") {
		if strings.Contains(line, "| ipvs |") && !strings.Contains(line, "skipped") {
			t.Errorf("a row hides a skip: %s", line)
		}
	}
	rows, err := csv.NewReader(strings.NewReader(mustFile(t, dir, ResultsFile))).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	skips, again := 0, 0
	for _, r := range rows[1:] {
		value, note := r[10], r[13]
		if strings.HasPrefix(note, "skipped: ") {
			skips++
			if value != "" {
				t.Errorf("a skip with a value: %q", r)
			}
		} else if value == "" {
			t.Errorf("no value and no reason: %q", r)
		}
		if strings.Contains(note, "again") {
			again++
		}
	}
	if skips == 0 || again == 0 {
		t.Errorf("%d skips and %d visits again in results.csv", skips, again)
	}
}

// A mode that was lost on the way up is skipped where it was lost, and not at the rung that it carried at first.
func TestLostModeKeepsTheRungsItHad(t *testing.T) {
	dir := mustRender(t, small(1))
	report := mustFile(t, dir, ReportFile)
	if strings.Contains(report, "100 skipped") {
		t.Error("the report calls a rung skipped that was measured")
	}
	for _, want := range []string{
		"172 µs at 10,000; 20,000 skipped ¹ |",
		"- iptables was not visited again: not programmed in 5m0s.\n",
		"| lab | 6.18 | iptables | 20,000; 100 again | connect tail, tax pod | skipped: not programmed in 5m0s |",
		"| lab | 6.18 | ipvs | 100; 1,000; 2,000; 5,000; 10,000; 20,000; 100 again | connect tail, tax pod | ",
	} {
		if !strings.Contains(report, want) {
			t.Errorf("the report does not say %q", want)
		}
	}
	for _, never := range []string{"ipvs was not visited again", "nftables was not visited again"} {
		if strings.Contains(report, never) {
			t.Errorf("the report says %q", never)
		}
	}
	_, rungs, _ := strings.Cut(report, "| target | mode | 100 |")
	for _, line := range strings.Split(rungs, "\n") {
		if cells := strings.Split(line, " | "); len(cells) > 2 && strings.HasPrefix(line, "| tail | iptables |") && strings.Contains(cells[2], "skipped") {
			t.Errorf("its first rung is skipped in %s", line)
		}
	}
	for _, v := range small(1).Verdicts() {
		if v.Mode == "iptables" && v.Metric == "p50" && !strings.HasSuffix(v.Note, "skipped at 20000 Services: not programmed in 5m0s") {
			t.Errorf("%s %s: %q", v.Target, v.Metric, v.Note)
		}
	}
}

func TestSmallestRungCameBack(t *testing.T) {
	run := synthetic{seed: 1, ladder: []int{100, 1000}, rounds: 10, rho: 0.001, sigma: 0.02}.run()
	report := mustFile(t, mustRender(t, run), ReportFile)
	if !strings.Contains(report, "came back within the noise floor") {
		t.Errorf("the report does not say that nothing drifted:\n%s", report)
	}
}

func TestTwoPlacesDoNotMix(t *testing.T) {
	run := small(1)
	for _, r := range slices.Clone(run.Records) {
		r.Kernel = "6.12"
		for i, v := range r.Values {
			r.Values = slices.Clone(r.Values)
			r.Values[i].Value = 3 * v.Value
		}
		run.Records = append(run.Records, r)
	}
	dir := mustRender(t, run)
	for _, name := range []string{"connect-tail-lab-6.18-2.png", "connect-tail-lab-6.12-2.png"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	for _, v := range run.Verdicts() {
		if v.Mode == "direct" && v.Metric == "p50" {
			want := map[string]float64{"6.18": 16000, "6.12": 48000}[v.Kernel]
			if v.AtSmallest < 0.95*want || v.AtSmallest > 1.05*want {
				t.Errorf("direct on %s: %.0f ns, want %.0f", v.Kernel, v.AtSmallest, want)
			}
		}
	}
}

func TestFloorOfOneTarget(t *testing.T) {
	// The floors were measured for one target alone, which stands for all.
	run := keep(synthetic{seed: 1, ladder: sixRungs, rounds: 6, rho: 0.003, sigma: 0.007}.run(), func(r Record, v Value) bool {
		return r.Scenario == "connect" && v.Metric == "p50" && (!strings.HasPrefix(r.Mode, "direct") || r.Target == "random")
	})
	for _, v := range run.Verdicts() {
		if v.Mode == "iptables" && v.Target == "tail" {
			if v.FloorMode != "direct-conntrack" || v.Model != Linear || !strings.Contains(v.Note, "noise floor of target random") {
				t.Errorf("%+v", v)
			}
			return
		}
	}
	t.Error("no verdict for the tail")
}

func TestMissingFloor(t *testing.T) {
	run := keep(small(1), func(r Record, v Value) bool {
		return v.Metric == "p50" && slices.Contains([]string{"direct", "direct-twin", "iptables", "ebpf"}, r.Mode)
	})
	run.Environment.Modes = slices.DeleteFunc(slices.Clone(run.Environment.Modes), func(m Mode) bool { return m.Name == "direct-conntrack" })
	for _, v := range run.Verdicts() {
		if v.Mode == "iptables" && v.Target == "tail" && (v.FloorMode != "direct" || v.Model != Linear || !strings.Contains(v.Note, "direct-conntrack was not measured")) {
			t.Errorf("%+v", v)
		}
	}
}

func TestThreeRungsSayWhatTheySee(t *testing.T) {
	run := synthetic{seed: 1, ladder: []int{100, 1000, 5000}, rounds: 6, rho: 0.003, sigma: 0.007}.run()
	report := mustFile(t, mustRender(t, run), ReportFile)
	for _, want := range []string{
		"On iptables, a connection to the last Service of the chain (tail) grows, by ",
		"On ebpf, no growth of a connection to the last Service of the chain (tail) is seen: ",
		"**Every new connection on an iptables node pays for the Services that the node carries, Service or not**: ",
		"**Every new connection on an iptables-legacy node pays for",
		"On iptables, the middle of the chain pays 0.",
		"| iptables | grows ",
	} {
		if !strings.Contains(report, want) {
			t.Errorf("the report does not say %q", want)
		}
	}
	for _, claim := range []string{"(O(n))", "| O(n)", "on an nftables node pays", "on an ebpf node pays"} {
		if strings.Contains(report, claim) {
			t.Errorf("three rungs say %q", claim)
		}
	}
}

func TestReportBeginsWithTheAnswer(t *testing.T) {
	run := synthetic{seed: 1, ladder: sixRungs, rounds: 6, rho: 0.003, sigma: 0.007}.run()
	answer, _, _ := strings.Cut(mustFile(t, mustRender(t, run), ReportFile), "\n## ")
	var rows []string
	for _, line := range strings.Split(answer, "\n") {
		if cells := strings.Split(line, " | "); strings.HasPrefix(line, "| ") {
			rows = append(rows, strings.TrimPrefix(cells[0], "| ")+" "+cells[1])
		}
	}
	want := []string{"mode verdict", "direct a floor", "direct-conntrack a floor", "iptables O(n)", "iptables-legacy O(n)", "ipvs skipped ²", "nftables O(1) ³", "ebpf O(1)"}
	if diff := cmp.Diff(want, rows); diff != "" {
		t.Errorf("rows of the first table (-want +got):\n%s", diff)
	}
	for text, times := range map[string]int{
		"the last Service of the chain, median":    1,
		"this kernel has no ip_vs":                 1, // below the table, not in its rows
		"not programmed in 5m0s":                   1,
		"20,000 skipped ¹":                         1,
		"Every new connection on an iptables node": 1,
		"](connect-tail.png)":                      1,
	} {
		if n := strings.Count(answer, text); n != times {
			t.Errorf("the answer says %q %d times, want %d:\n%s", text, n, times, answer)
		}
	}
	if table, picture := strings.Index(answer, "| ebpf |"), strings.Index(answer, "!["); table > picture {
		t.Error("the picture stands above the table")
	}
}

// What is measured once a rung has figures and nothing else.
func TestProgrammingHasNoInterval(t *testing.T) {
	run := small(1)
	for _, v := range run.Verdicts() {
		if v.Scenario != "programming" || v.Points == 0 {
			continue
		}
		if v.Low == v.Low || v.High == v.High || v.Model != Undecided || v.Grows || !strings.Contains(v.Note, "one measurement a rung") {
			t.Errorf("%+v", v)
		}
	}
	for _, c := range run.Crossovers() {
		if c.Scenario == "programming" {
			t.Errorf("%+v", c)
		}
	}
	_, section, _ := strings.Cut(mustFile(t, mustRender(t, run), ReportFile), "## Programming: time until the newest Service answers\n")
	section, _, _ = strings.Cut(section, "\n## ")
	if !strings.Contains(section, "The same for all modes, time until the Services are written: 1.00 ms at 100, ") {
		t.Errorf("nothing about the fleet:\n%s", section)
	}
	if !strings.Contains(section, "| nftables | 420 ms | 4.02 s |") || strings.Contains(section, "slope") || strings.Contains(section, "undecided") {
		t.Errorf("programming:\n%s", section)
	}
}

// What tells how good a measurement was is no cost: it has no verdict, no crossover and no picture.
func TestOnlyCostsAreJudged(t *testing.T) {
	dir := mustRender(t, synthetic{seed: 1, ladder: sixRungs, rounds: 6, rho: 0.003, sigma: 0.007}.run())
	got := map[string][]string{}
	for _, name := range []string{VerdictsFile, CrossoversFile} {
		rows, err := csv.NewReader(strings.NewReader(mustFile(t, dir, name))).ReadAll()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rows[1:] {
			if !slices.Contains(got[name], r[4]) {
				got[name] = append(got[name], r[4])
			}
		}
		slices.Sort(got[name])
	}
	want := map[string][]string{
		VerdictsFile:   {"cpu", "mean", "p50", "p90", "p99", "programming", "proxy-programming-cpu", "proxy-rss"},
		CrossoversFile: {"cpu", "mean", "p50", "p90", "p99"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("judged metrics (-want +got):\n%s", diff)
	}
	report := mustFile(t, dir, ReportFile)
	for _, want := range []string{
		"full speed during 87.5 % of the connects (median of the visits; the least is 85.0 %: direct, connect head at 100 Services, round 5)",
		"is 80.0 % of what the machine used", "ebpf 0 ns/op (at most 200 ns/op)",
	} {
		if !strings.Contains(report, want) {
			t.Errorf("the report does not say %q", want)
		}
	}
}

func TestWarningsAreCounted(t *testing.T) {
	run := small(1)
	for i := range run.Records {
		if r := &run.Records[i]; r.Skipped == "" && r.Scenario != "programming" && r.Mode == "ebpf" {
			r.Warnings = []string{fmt.Sprintf("everything else used %d %% of the machine", 6+r.Round), "the chain moved"}
			if r.Target == "tail" {
				r.Warnings[1] = fmt.Sprintf("full speed during %d.5 of 300 connects only", 20-r.Round)
			}
		}
	}
	_, section, _ := strings.Cut(mustFile(t, mustRender(t, run), ReportFile), "## Warnings\n")
	section, _, _ = strings.Cut(section, "\n## ")
	// Six rungs and the smallest again, six rounds each; every warning stands in the records of both targets.
	for _, want := range []string{
		"| everything else used 6 to 11 % of the machine | 42 | 84 | connect tail on ebpf at 100, round 0 |",
		"| full speed during 15.5 to 20.5 of 300 connects only | 42 | 42 | connect tail on ebpf at 100, round 0 |",
		"| the chain moved | 42 | 42 | tax pod on ebpf at 100, round 0 |",
		"| other processes used 7 % of the CPU | 2 | 2 | connect tail on nftables at 100, round 2 |",
	} {
		if !strings.Contains(section, want) {
			t.Errorf("no %q in:\n%s", want, section)
		}
	}
	if lines := strings.Count(section, "\n|"); lines != 6 {
		t.Errorf("%d lines of table, want 6:\n%s", lines, section)
	}
}

// A visit that did not count leaves a record without a value, and the report says that there was one.
func TestVisitsWithoutValue(t *testing.T) {
	run := small(1)
	for i := range run.Records {
		r := &run.Records[i]
		void := r.Mode == "nftables" && r.Services == 1000 && r.Round < 2 || r.Mode == "ebpf" && r.Services == 100 || r.Mode == "iptables-legacy"
		if void && r.Target == "tail" && r.Skipped == "" {
			r.Values, r.Warnings = nil, []string{"no latency"}
		}
	}
	report := mustFile(t, mustRender(t, run), ReportFile)
	answer, _, _ := strings.Cut(report, "\n## ")
	if !strings.Contains(answer, "| iptables-legacy | no value ") {
		t.Errorf("the answer hides a mode without a value:\n%s", answer)
	}
	for _, want := range []string{"| ebpf | no value ", "2 rounds without a value: see the warnings", "| tail | iptables-legacy | no value "} {
		if !strings.Contains(report, want) {
			t.Errorf("the report does not say %q", want)
		}
	}
	for _, v := range run.Verdicts() {
		if v.Mode == "ebpf" && v.Target == "tail" && v.Metric == "p50" && (v.Smallest != 1000 || v.Points != 5) {
			t.Errorf("ebpf without its first rung: %+v", v)
		}
	}
	// The second visit of the smallest rung has nothing to be compared with.
	for _, d := range newTable(run).drifts() {
		if d.mode == "ebpf" && d.target == "tail" {
			t.Errorf("%+v", d)
		}
	}
}

func TestWideRangesAreLogarithmic(t *testing.T) {
	for top, want := range map[float64]bool{29 * 16000: false, 31 * 16000: true} {
		run := &Run{Environment: Environment{Modes: allModes}}
		for n, y := range map[int]float64{100: 16000, 10000: top} {
			run.Records = append(run.Records, Record{Scenario: "tax", Provider: "lab", Kernel: "6", Mode: "iptables", Target: "pod", Services: n, Values: []Value{{"p50", "ns", y}}})
		}
		f := newTable(run).plan()[0]
		if f.logY != want || strings.Contains(f.yLabel, "log") != want {
			t.Errorf("medians from 16 to %.0f µs: logarithmic is %v, %q", top/1000, f.logY, f.yLabel)
		}
	}
	var labels []string
	for _, tick := range yTicks(axes{yMin: 11, yMax: 800}, true) {
		labels = append(labels, tick.Label)
	}
	if diff := cmp.Diff([]string{"20", "50", "100", "200", "500"}, labels); diff != "" {
		t.Error(diff)
	}
}

func TestCompare(t *testing.T) {
	a, b := small(1), small(2)
	same, err := Compare(a, b)
	if err != nil {
		t.Fatal(err)
	}
	if !same.Same() || !strings.Contains(same.String(), "The runs agree.") {
		t.Errorf("two runs of one truth:\n%s", same)
	}
	// ebpf becomes 8 % dearer, and iptables-legacy flat.
	for i, r := range b.Records {
		for j, v := range r.Values {
			if v.Metric != "p50" {
				continue
			}
			switch r.Mode {
			case "ebpf":
				b.Records[i].Values[j].Value = 1.08 * v.Value
			case "iptables-legacy":
				b.Records[i].Values[j].Value -= 2.7 * float64(r.Services)
			}
		}
	}
	other, err := Compare(a, b)
	if err != nil {
		t.Fatal(err)
	}
	text := other.String()
	if other.Same() {
		t.Errorf("runs that differ are called the same:\n%s", text)
	}
	for _, r := range other.Rows {
		ratio, verdict := strings.Contains(r.Name, "p50-ns ebpf"), strings.Contains(r.Name, "p50-ns iptables-legacy")
		if r.SameVerdict() == verdict || r.SameRatio() == (ratio || verdict) {
			t.Errorf("%+v", r)
		}
	}
	for _, want := range []string{"verdicts differ", "ratios differ", "The runs do not agree."} {
		if !strings.Contains(text, want) {
			t.Errorf("the text does not say %q:\n%s", want, text)
		}
	}
	b = keep(b, func(r Record, _ Value) bool { return r.Mode != "ebpf" })
	if less, err := Compare(a, b); err != nil || less.Same() || len(less.OnlyA) == 0 || !strings.Contains(less.String(), "only in A: ") {
		t.Errorf("a mode is missing in B: %v\n%s", err, less)
	}
	if _, err := Compare(a, &Run{}); err == nil {
		t.Error("runs with nothing in common can be compared")
	}
}

func TestLabelsStandApart(t *testing.T) {
	for _, wanted := range [][]float64{{}, {5}, {5, 5, 5}, {0, 1, 50, 50, 100}, {95, 96, 97, 98}} {
		got := apart(wanted, 10, 0, 100)
		for i, y := range got {
			if i > 0 && y-got[i-1] < 10-1e-9 || y < 0 || y > 100 {
				t.Errorf("%v: %v", wanted, got)
			}
		}
	}
}

func TestNumbersReadWell(t *testing.T) {
	for _, test := range []struct{ got, want string }{
		{quantity(16300, "ns"), "16.3 µs"}, {quantity(31000, "ns/op"), "31.0 µs/op"}, {quantity(240, "ns"), "240 ns"}, {quantity(3.8e10, "ns"), "38.0 s"},
		{quantity(5<<20, "bytes"), "5.00 MiB"}, {quantity(12, "instructions"), "12.0 instructions"}, {number(1234567), "1,234,567"}, {number(100), "100"},
		{formatValue(0.00012), "0.00012"}, {formatValue(0), "0"}, {percent(0.0123), "1.23 %"},
	} {
		if test.got != test.want {
			t.Errorf("got %q, want %q", test.got, test.want)
		}
	}
	var b bytes.Buffer
	b.Write(verdictsCSV([]Verdict{{Model: Undecided, Slope: zero / zero}}))
	if strings.Contains(b.String(), "NaN") {
		t.Errorf("NaN in a CSV: %s", b.String())
	}
}
