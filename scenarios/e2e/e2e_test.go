// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/onsi/ginkgo/v2/types"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/dataplane"
)

// A program in the suite's place lists these.
const listing = `The following spec names can be used with 'ginkgo run --focus/skip':
    test/e2e/network/service.go:784: [sig-network] Services should serve | a basic endpoint
    test/e2e/network/service.go:799: [sig-network] Services should be rejected [Slow]
    test/e2e/network/loadbalancer.go:99: [sig-network] Services should have a load balancer [Feature:LoadBalancer]
    test/e2e/network/dual_stack.go:40: [sig-network] [Feature:IPv6DualStack] should have two addresses
    test/e2e/network/dns.go:12: [sig-network] DNS should provide DNS
`

func newSuite(t *testing.T, plan Plan) *suite {
	t.Helper()
	plan.Bin, plan.Cache, plan.Out = t.TempDir(), t.TempDir(), t.TempDir()
	script := "#!/bin/sh\ncat <<'END'\n" + listing + "END\n"
	for file, content := range map[string]string{filepath.Join(plan.Bin, suiteFile): script, filepath.Join(plan.Bin, ginkgoFile): "", filepath.Join(plan.Cache, archiveFile): ""} {
		if err := os.WriteFile(file, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return &suite{plan: plan}
}

func TestChoose(t *testing.T) {
	basic, rejected := "[sig-network] Services should serve | a basic endpoint", "[sig-network] Services should be rejected [Slow]"
	dual := "[sig-network] [Feature:IPv6DualStack] should have two addresses"
	for _, test := range []struct {
		plan      Plan
		chosen    []string
		leftAside int
	}{
		{Plan{}, []string{basic, dual}, 1},
		{Plan{Slow: true}, []string{rejected, basic, dual}, 1},
		{Plan{Focus: "DNS"}, []string{"[sig-network] DNS should provide DNS"}, 0},
	} {
		s := newSuite(t, test.plan)
		if err := s.choose(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(s.chosen, test.chosen) || len(s.names)-len(s.chosen) != test.leftAside {
			t.Errorf("%+v chooses %q of %q", test.plan, s.chosen, s.names)
		}
	}
	for _, focus := range []string{"(", "nothing is called so"} {
		if err := newSuite(t, Plan{Focus: focus}).choose(context.Background()); err == nil {
			t.Errorf("focus %q is no error", focus)
		}
	}
}

// What has ended stands in the table and is not done again; a line that was cut off is.
func TestResume(t *testing.T) {
	s := newSuite(t, Plan{Slow: true, Runs: 2, Modes: []string{"iptables", "ebpf"}, Families: clusters.IPFamilies()})
	if err := s.choose(t.Context()); err != nil {
		t.Fatal(err)
	}
	ended := func(p pass, text string) {
		t.Helper()
		dir := s.dir(p)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, endedFile), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	passed := `{"name":"` + s.chosen[1] + `","outcome":"passed","seconds":2}` + "\n"
	failed := `{"name":"` + s.chosen[1] + `","outcome":"failed","seconds":2,"reason":"no answer\nat all"}` + "\n"
	ended(pass{"iptables", clusters.IPv4, 1}, passed)
	ended(pass{"ebpf", clusters.IPv4, 1}, passed+`{"name":"`+s.chosen[0])
	ended(pass{"ebpf", clusters.IPv4, 2}, failed)
	ended(pass{"nftables", clusters.IPv6, 1}, passed) // of a run before this one, with other modes
	ended(pass{"somebody's", clusters.IPv6, 1}, passed)
	record := batch{Began: time.Now(), Seconds: 90, About: "Kubernetes v1.99.0; a machine"}
	for _, p := range []pass{{"iptables", clusters.IPv4, 1}, {"ebpf", clusters.IPv4, 1}, {"ebpf", clusters.IPv4, 2}, {"nftables", clusters.IPv6, 1}} {
		if err := errors.Join(s.leave(p, ""), appendLines(filepath.Join(s.dir(p), batchesFile), record)); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		pass
		want int
	}{
		{pass{"iptables", clusters.IPv4, 1}, 1}, {pass{"iptables", clusters.IPv4, 2}, 2}, {pass{"ebpf", clusters.IPv4, 1}, 1},
		{pass{"ebpf", clusters.IPv6, 1}, 2}, {pass{"ebpf", clusters.DualStack, 1}, 3},
	} {
		if due, err := s.due(test.pass); err != nil || len(due) != test.want {
			t.Errorf("%v: left are %q (%v), want %d", test.pass, due, err, test.want)
		}
	}
	if err := appendLines(filepath.Join(s.dir(pass{"ebpf", clusters.IPv4, 1}), endedFile), Spec{Name: s.chosen[0], Outcome: Passed}); err != nil {
		t.Fatal(err)
	}
	if err := s.write(); err != nil {
		t.Fatal(err)
	}
	rows := table(t, s.plan.Out)
	for _, want := range [][]string{
		{s.chosen[1], "ebpf", "ipv4", "2", "failed", "2.0", "no answer"}, {s.chosen[0], "ebpf", "ipv4", "1", "passed", "0.0", ""},
	} {
		if !slices.ContainsFunc(rows, func(r []string) bool { return slices.Equal(r, want) }) {
			t.Errorf("no row %q in %q", want, rows)
		}
	}
	page, err := os.ReadFile(filepath.Join(s.plan.Out, PageFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"\n## IPv4\n\n| spec | iptables | nftables | ebpf | |\n", `serve \| a basic endpoint | passed |  | **1 of 2** | no answer |`, "| skipped |  | skipped | needs a cloud's load balancer |",
		"\n| IPv4 | ebpf | 2 | 1 | 1 | 1 | 1.5 |\n", "\n| IPv6 | nftables | 1 | 1 | 0 | 1 | 1.5 |\n", "\n- Kubernetes v1.99.0; a machine\n",
	} {
		if !strings.Contains(string(page), want) {
			t.Errorf("the page has no %q:\n%s", want, page)
		}
	}
	if strings.Contains(string(page), "somebody's") {
		t.Errorf("the page has a mode that there is not:\n%s", page)
	}
}

// table is the table in a folder of results.
func table(t *testing.T, out string) [][]string {
	t.Helper()
	f, err := os.Open(filepath.Join(out, TableFile))
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

// errNoCluster is what a fakeProvider says.
var errNoCluster = errors.New("no cluster can be made")

// A fakeProvider gives nodes what they want, but for those of some sites, and makes no clusters.
type fakeProvider struct {
	clusters.Provider
	refuses []string
}

func (p fakeProvider) Supports(spec clusters.ProxySpec) error {
	if slices.Contains(p.refuses, spec.Name) {
		return fmt.Errorf("no lanes: %w", clusters.ErrNotSupported)
	}
	return nil
}

func (fakeProvider) Create(context.Context, clusters.Plan) ([]clusters.Cluster, error) {
	return nil, errNoCluster
}

// A mode that cannot be had here stands in the table with the reason, until it can, and the others go on. So do specs that no cluster can pass,
// whatever the focus of later commands.
func TestRefusedMode(t *testing.T) {
	s := newSuite(t, Plan{Families: []clusters.IPFamily{clusters.IPv4}})
	const (
		basic, dns = "[sig-network] Services should serve | a basic endpoint", "[sig-network] DNS should provide DNS"
		lb         = "[sig-network] Services should have a load balancer [Feature:LoadBalancer]"
		needsCloud = "needs a cloud's load balancer"
	)
	// direct is the mode that every host has.
	noDirect := func(name string) []string {
		return []string{name, "direct", "ipv4", "1", "skipped", "0.0", "mode direct: no lanes"}
	}
	run := func(focus string, runs int, refuses []string, modes ...string) error {
		s.plan.Focus, s.plan.Runs, s.plan.Modes = focus, runs, modes
		return Run(t.Context(), s.plan, fakeProvider{refuses: refuses}, silent{})
	}
	expect := func(want ...[]string) {
		t.Helper()
		rows := table(t, s.plan.Out)[1:]
		rows = slices.DeleteFunc(rows, func(r []string) bool { return r[1] != "direct" })
		if !slices.EqualFunc(rows, want, slices.Equal) {
			t.Errorf("the table has\n%q, want\n%q", rows, want)
		}
	}

	direct := []string{"direct"}
	for _, focus := range []string{"", "DNS"} {
		if err := run(focus, 2, direct, "direct"); err == nil || !strings.Contains(err.Error(), "no lanes") {
			t.Errorf("focus %q: no mode could be had, and the error is %v", focus, err)
		}
	}
	expect(noDirect(dns), []string{lb, "direct", "ipv4", "1", "skipped", "0.0", needsCloud}, noDirect(basic))
	page, err := os.ReadFile(filepath.Join(s.plan.Out, PageFile))
	if want := "\n| IPv4 | direct | 0 | 0 | 0 | 3 |  |\n\nSkipped with all specs:\n- mode direct: no lanes\n"; err != nil || !strings.Contains(string(page), want) {
		t.Errorf("the page has no %q (%v):\n%s", want, err, page)
	}

	// It can be had now, but no cluster of it.
	if err := run("", 2, nil, "direct"); !errors.Is(err, errNoCluster) {
		t.Errorf("no cluster could be made, and the error is %v", err)
	}
	expect()
	for p := (pass{"direct", clusters.IPv4, 1}); p.run <= 2; p.run++ {
		if err := errors.Join(os.MkdirAll(s.dir(p), 0o755), appendLines(filepath.Join(s.dir(p), endedFile), Spec{Name: basic, Outcome: Passed, Seconds: 1})); err != nil {
			t.Fatal(err)
		}
	}
	if err := run("", 2, []string{"iptables"}, "iptables", "direct"); err != nil {
		t.Errorf("one mode of two can be had: %v", err)
	}
	expect([]string{lb, "direct", "ipv4", "1", "skipped", "0.0", needsCloud}, []string{lb, "direct", "ipv4", "2", "skipped", "0.0", needsCloud},
		[]string{basic, "direct", "ipv4", "1", "passed", "1.0", ""}, []string{basic, "direct", "ipv4", "2", "passed", "1.0", ""})
	if rows := table(t, s.plan.Out)[1:]; !slices.ContainsFunc(rows, func(r []string) bool { return r[1] == "iptables" && strings.HasPrefix(r[6], "mode iptables: ") }) {
		t.Errorf("the refused mode is not in %q", rows)
	}
}

// What has ended before an error is in the table.
func TestErrorAfterResults(t *testing.T) {
	s := newSuite(t, Plan{Runs: 2, Modes: []string{"direct"}, Families: []clusters.IPFamily{clusters.IPv4}})
	p := pass{"direct", clusters.IPv4, 1}
	if err := errors.Join(os.MkdirAll(s.dir(p), 0o755), appendLines(filepath.Join(s.dir(p), endedFile), Spec{Name: "[sig-network] Services should serve | a basic endpoint", Outcome: Passed})); err != nil {
		t.Fatal(err)
	}
	if err := Run(t.Context(), s.plan, fakeProvider{}, silent{}); !errors.Is(err, errNoCluster) {
		t.Errorf("no cluster could be made, and the error is %v", err)
	}
	if rows := table(t, s.plan.Out)[1:]; len(rows) != 2 {
		t.Errorf("the table has %q, want a spec that passed and one that is skipped", rows)
	}
}

// An interrupt is no refusal.
func TestInterruptedWhileModesAreAsked(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s := &suite{provider: fakeProvider{refuses: []string{"direct"}}}
	mode, err := dataplane.Find("direct")
	if err != nil {
		t.Fatal(err)
	}
	if why, err := s.refuses(ctx, mode); why != "" || !errors.Is(err, context.Canceled) {
		t.Errorf("refused because of %q (%v)", why, err)
	}
}

// A fakeCluster has programs run on this host.
type fakeCluster struct{ clusters.Testable }

func (fakeCluster) Versions() map[string]string {
	return map[string]string{"kubernetes": "Kubernetes v1.99.0"}
}
func (fakeCluster) Administrator() (kubeconfig, kubectl string) { return "kubeconfig", "kubectl" }

func (fakeCluster) Start(_ string, argv, env []string, _ string) (clusters.TestProcess, error) {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = env
	p := &fakeProcess{done: make(chan struct{})}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

type fakeProcess struct{ done chan struct{} }

func (p *fakeProcess) Done() <-chan struct{}       { return p.done }
func (p *fakeProcess) Close(context.Context) error { return nil }

type silent struct{}

func (silent) Step(string) {}

// Where a spec has not come to its end that is an error; those that have are not run again.
func TestSpecWithoutAnEnd(t *testing.T) {
	s := newSuite(t, Plan{Slow: true, Runs: 1, Modes: []string{"ebpf"}, Families: []clusters.IPFamily{clusters.IPv4}, Processes: 3})
	s.report = silent{}
	if err := s.choose(t.Context()); err != nil {
		t.Fatal(err)
	}
	said, err := json.Marshal([]types.Report{{SpecReports: []types.SpecReport{
		{ContainerHierarchyTexts: []string{"[sig-network] Services"}, LeafNodeType: types.NodeTypeIt, LeafNodeText: "should serve | a basic endpoint", State: types.SpecStatePassed, NumAttempts: 1},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\nfor word; do case $word in --output-dir=*) cat >${word#*=}/report.json <<'END'\n" + string(said) + "\nEND\n;; esac; done\n"
	if err := os.WriteFile(filepath.Join(s.plan.Bin, ginkgoFile), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	p := pass{"ebpf", clusters.IPv4, 1}
	names, err := s.due(p)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.run(t.Context(), fakeCluster{}, p, names); err == nil || !strings.Contains(err.Error(), s.chosen[0]) {
		t.Errorf("want an error that names %q, got %v", s.chosen[0], err)
	}
	if due, err := s.due(p); err != nil || !slices.Equal(due, s.chosen[:1]) {
		t.Errorf("left are %q (%v), want %q", due, err, s.chosen[:1])
	}
	if err := s.write(); err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(s.plan.Out, PageFile))
	if err != nil || !strings.Contains(string(page), "\n- Kubernetes v1.99.0; a control plane and 6 workers in 3 zones; 3 specs at a time, those that disturb others one by one;") {
		t.Errorf("the page does not say what was tested (%v):\n%s", err, page)
	}
}

// Specs that restart what others need run when these have ended.
func TestDisruptiveSpecsRunByThemselves(t *testing.T) {
	s := newSuite(t, Plan{Slow: true, Runs: 1, Modes: []string{"ebpf"}, Families: []clusters.IPFamily{clusters.IPv4}, Processes: 3})
	s.report = silent{}
	calls := filepath.Join(s.plan.Bin, "calls")
	script := "#!/bin/sh\necho \"$*\" >>" + calls + "\nfor word; do case $word in --output-dir=*) echo '[]' >${word#*=}/report.json;; esac; done\n"
	if err := os.WriteFile(filepath.Join(s.plan.Bin, ginkgoFile), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	const restart = "should work after a restart [Disruptive]"
	for _, names := range [][]string{{restart}, {"should serve", restart}} {
		if err := s.run(t.Context(), fakeCluster{}, pass{"ebpf", clusters.IPv4, 1}, names); err == nil {
			t.Error("no spec has ended, and that is no error")
		}
	}
	b, err := os.ReadFile(calls)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	if len(lines) != 2 || !strings.Contains(lines[0], "--procs=1 ") || !strings.Contains(lines[0], "restart") || !strings.Contains(lines[1], "--procs=3 ") || strings.Contains(lines[1], "restart") {
		t.Errorf("Ginkgo was called so:\n%s", b)
	}
}

// What Ginkgo reports of specs that were run is kept, and nothing of others.
func TestOutcomes(t *testing.T) {
	spec := func(text string, state types.SpecState, attempts int, message string) types.SpecReport {
		return types.SpecReport{
			ContainerHierarchyTexts: []string{"[sig-network] Services"}, LeafNodeType: types.NodeTypeIt, LeafNodeText: text,
			State: state, NumAttempts: attempts, RunTime: 1500 * time.Millisecond, Failure: types.Failure{Message: message},
		}
	}
	report, err := json.Marshal([]types.Report{{SpecReports: []types.SpecReport{
		{LeafNodeType: types.NodeTypeBeforeSuite, State: types.SpecStatePassed, NumAttempts: 1},
		spec("a", types.SpecStatePassed, 1, ""), spec("b", types.SpecStateSkipped, 1, "needs two zones"), spec("c", types.SpecStateSkipped, 0, ""),
		spec("d", types.SpecStatePanicked, 1, "nil map"), spec("e", types.SpecStateTimedout, 1, "late"), spec("f", types.SpecStateInterrupted, 1, "Ctrl-C"),
	}}})
	if err != nil {
		t.Fatal(err)
	}
	got, err := outcomes(report)
	if err != nil {
		t.Fatal(err)
	}
	want := []Spec{
		{"[sig-network] Services a", Passed, 1.5, ""}, {"[sig-network] Services b", Skipped, 1.5, "needs two zones"},
		{"[sig-network] Services d", Failed, 1.5, "nil map"}, {"[sig-network] Services e", Failed, 1.5, "late"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("outcomes are %+v, want %+v", got, want)
	}
	if _, err := outcomes([]byte("{")); err == nil {
		t.Error("half a report is no error")
	}
}
