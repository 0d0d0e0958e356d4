// SPDX-License-Identifier: Apache-2.0

// Package e2e runs Kubernetes' own end-to-end tests of Services against clusters of each mode, and puts what came of them side by side.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/onsi/ginkgo/v2/types"
	"golang.org/x/sys/unix"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/dataplane"
	"github.com/plimsoll-bench/plimsoll/results"
)

// An Outcome is how a spec ended.
type Outcome string

const (
	Passed  Outcome = "passed"
	Failed  Outcome = "failed"
	Skipped Outcome = "skipped"
)

// A Spec is one test that has ended.
type Spec struct {
	// Name is the whole text of the spec, as Kubernetes' focus matches it.
	Name    string  `json:"name"`
	Outcome Outcome `json:"outcome"`
	Seconds float64 `json:"seconds"`
	// Reason is why it was skipped or failed.
	Reason string `json:"reason,omitempty"`
}

// A Plan says what is to be tested, and where.
type Plan struct {
	// Run names what is made, as in clusters.Plan.
	Run string
	// Modes are those whose clusters are made, one after another, and Families which of them each mode has.
	Modes    []string
	Families []clusters.IPFamily
	// Focus is a regular expression of specs' names; empty is all that test Services.
	Focus string
	// Slow adds the specs that are slow, and those that disturb a cluster.
	Slow bool
	// Runs is how many times each mode's specs are run, in one cluster of each family.
	Runs int
	// Processes is how many specs run at a time, where they may.
	Processes int
	// Out is the folder for the results. What a run there that was cut off has finished is not done again.
	Out string
	// Bin is the folder with the programs, Cache that of what takes long to build.
	Bin, Cache string
	// NodeImage is that of kind's nodes; empty for the provider's choice.
	NodeImage string
	// Environment is the machine's, for the page.
	Environment results.Environment
}

// servicesFocus are the specs that test Services.
const servicesFocus = `\[sig-network\] (Services |LoadBalancers |Networking Granular Checks: Services|Conntrack|KubeProxy|Traffic Distribution|\[Feature:IPv6DualStack\]|.*IPv6)`

// slow are the specs that Plan.Slow adds.
var slow = regexp.MustCompile(`\[(Slow|Disruptive)\]`)

// dualStack are the specs that are for clusters of both families alone.
const dualStack = "[Feature:IPv6DualStack]"

// impossible are specs that no cluster of these can pass, and why.
var impossible = []struct {
	name *regexp.Regexp
	why  string
}{
	{regexp.MustCompile(`\[Feature:LoadBalancer\]`), "needs a cloud's load balancer"},
	{regexp.MustCompile(`\[Feature:Networking-(IPv4|IPv6|DNS)\]`), "needs the Internet"},
}

// An image is a container image of the archive that `make e2e-parts` makes, and what specs call images that it can stand for.
type image struct {
	name  string
	means *regexp.Regexp
}

// images are those of the archive. Specs that want others than agnhost find there what they call.
var images = []image{
	{"localhost/plimsoll-e2e:agnhost", regexp.MustCompile(`e2e-test-images-(agnhost|busybox)-|-distroless-iptables-|-pause-`)},
	{"localhost/plimsoll-e2e:regression-issue-74839", regexp.MustCompile(`regression-issue-74839`)},
}

// The parts, which `make e2e-parts` makes.
const (
	suiteFile   = "e2e.test"                     // in Plan.Bin
	ginkgoFile  = "ginkgo"                       // in Plan.Bin
	archiveFile = "e2e.tar"                      // in Plan.Cache
	repository  = "localhost/plimsoll-e2e/specs" // that specs are told to take images from
)

// A Reporter is told of the run.
type Reporter interface {
	Step(what string)
}

// Run makes a cluster of each mode and family, has the specs run there, and writes the results' files after each.
func Run(ctx context.Context, plan Plan, provider clusters.Provider, report Reporter) error {
	if err := Parts(plan.Bin, plan.Cache); err != nil {
		return err
	}
	s := &suite{plan: plan, provider: provider, report: report}
	if err := s.choose(ctx); err != nil {
		return err
	}
	refused := map[string]string{} // mode → why
	for _, name := range plan.Modes {
		mode, err := dataplane.Find(name)
		if err != nil {
			return err
		}
		why, err := s.refuses(ctx, mode)
		if err != nil {
			return fmt.Errorf("mode %s: %w", name, err)
		}
		if why != "" {
			refused[name] = why
			report.Step(fmt.Sprintf("mode %s is skipped: %s", name, why))
		}
		for _, family := range plan.Families {
			if why == "" {
				err = s.test(ctx, mode, family)
			}
			// What has ended before an error counts.
			for _, p := range s.passes(name, family) {
				err = errors.Join(err, s.leave(p, why))
			}
			if err := errors.Join(err, s.write()); err != nil {
				return fmt.Errorf("%s, %s: %w", name, family, err)
			}
		}
	}
	if len(refused) == len(plan.Modes) {
		return fmt.Errorf("no mode of %v runs here: %v", plan.Modes, refused)
	}
	return nil
}

// refuses says why there can be no cluster of a mode here; empty where there can.
func (s *suite) refuses(ctx context.Context, mode dataplane.Mode) (why string, err error) {
	if err = mode.Supported(ctx); err == nil {
		err = s.provider.Supports(mode.Spec(settings))
	}
	switch {
	case ctx.Err() != nil: // whatever was asked may say no for that reason
		return "", context.Cause(ctx)
	case errors.Is(err, clusters.ErrNotSupported):
		return clusters.Reason(err), nil
	}
	return "", err
}

// Parts says what of what a run needs is not there, in bin, the folder of programs, and in cache.
func Parts(bin, cache string) error {
	for _, part := range []string{filepath.Join(bin, suiteFile), filepath.Join(bin, ginkgoFile), filepath.Join(cache, archiveFile)} {
		if _, err := os.Stat(part); err != nil {
			return fmt.Errorf("%w: make e2e-parts makes it", err)
		}
	}
	return nil
}

// A suite is a Run at work.
type suite struct {
	plan     Plan
	provider clusters.Provider
	report   Reporter
	// names are the specs in the focus, and chosen those of them that can be run. Sorted.
	names, chosen []string
	// started counts what was started in clusters.
	started int
}

// listed is a spec's name in what the suite lists: after the file and line where it stands.
var listed = regexp.MustCompile(`(?m)^\s*(?:\S+\.go:\d+: )?(\[sig-.*)$`)

// choose asks the suite for its specs.
func (s *suite) choose(ctx context.Context) error {
	focus := s.plan.Focus
	if focus == "" {
		focus = servicesFocus
	}
	wanted, err := regexp.Compile(focus)
	if err != nil {
		return fmt.Errorf("--focus: %w", err)
	}
	out, err := s.ask(ctx, "--list-tests")
	if err != nil {
		return err
	}
	for _, m := range listed.FindAllSubmatch(out, -1) {
		name := strings.TrimSpace(string(m[1]))
		if wanted.MatchString(name) && (s.plan.Slow || !slow.MatchString(name)) {
			s.names = append(s.names, name)
		}
	}
	slices.Sort(s.names)
	s.names = slices.Compact(s.names)
	s.chosen = slices.DeleteFunc(slices.Clone(s.names), func(name string) bool { return cannot(name) != "" })
	if len(s.chosen) == 0 {
		return fmt.Errorf("no spec has a name that matches %q", focus)
	}
	return nil
}

// cannot says why a spec is none that the clusters here can pass; empty where they can.
func cannot(name string) string {
	for _, i := range impossible {
		if i.name.MatchString(name) {
			return i.why
		}
	}
	if strings.Contains(name, "[Feature:SCTPConnectivity]") && !hasSCTP() {
		return "the kernel has no SCTP"
	}
	return ""
}

// hasSCTP tells whether the kernel, which is the nodes' too, has SCTP.
func hasSCTP() bool {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	if err != nil {
		return false
	}
	unix.Close(socket)
	return true
}

// environment has the suite take images from a repository that no registry has.
func environment() []string { return append(os.Environ(), "KUBE_TEST_REPO="+repository) }

// ask runs the suite with a flag that makes it tell something and end.
func (s *suite) ask(ctx context.Context, flag string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(s.plan.Bin, suiteFile), flag)
	cmd.Env = environment()
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", suiteFile, flag, err)
	}
	return out, nil
}

// The specs of traffic distribution want three zones of two workers each, and one of health checks three workers.
const workers, zones = 6, 3

// Nodes is how many nodes a cluster has.
const Nodes = workers + 1

// settings leave kube-proxy as users have it.
var settings = dataplane.Settings{ProxyDefaults: true}

// test has the specs run in a mode's clusters of one family that have not.
func (s *suite) test(ctx context.Context, mode dataplane.Mode, family clusters.IPFamily) (err error) {
	type work struct {
		pass
		specs []string
	}
	var left []work
	for _, p := range s.passes(mode.Name(), family) {
		due, err := s.due(p)
		if err != nil {
			return err
		}
		if len(due) > 0 {
			left = append(left, work{p, due})
		}
	}
	if len(left) == 0 {
		s.report.Step(fmt.Sprintf("%s, %s: nothing is left to run", mode.Name(), family))
		return nil
	}
	spec := mode.Spec(settings)
	made, err := s.provider.Create(ctx, clusters.Plan{
		Name: s.plan.Run, Dir: filepath.Join(s.plan.Out, mode.Name(), string(family), "cluster"), Bin: s.plan.Bin, Cache: s.plan.Cache, NodeImage: s.plan.NodeImage,
		Sites: []clusters.ProxySpec{spec}, Workers: workers, Zones: zones, IPFamily: family, Progress: s.report.Step,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, made[0].Close(context.WithoutCancel(ctx))) }()
	if err := made[0].Sites()[0].Err(); err != nil {
		return err
	}
	cluster, ok := made[0].(clusters.Testable)
	if !ok {
		return fmt.Errorf("clusters of %s are none that Kubernetes' tests can be run against", s.provider.Name())
	}
	if err := s.loadImages(ctx, cluster); err != nil {
		return err
	}
	for _, w := range left {
		if err := s.run(ctx, cluster, w.pass, w.specs); err != nil {
			return err
		}
	}
	return nil
}

// loadImages puts the archive's images into a cluster under all names by which specs may ask for them.
func (s *suite) loadImages(ctx context.Context, cluster clusters.Testable) error {
	out, err := s.ask(ctx, "--list-images")
	if err != nil {
		return err
	}
	s.report.Step("loading the specs' images")
	names := map[string][]string{}
	for _, i := range images {
		for name := range strings.FieldsSeq(string(out)) {
			if strings.HasPrefix(name, repository) && i.means.MatchString(name) {
				names[i.name] = append(names[i.name], name)
			}
		}
	}
	return cluster.LoadImages(ctx, filepath.Join(s.plan.Cache, archiveFile), names)
}

// disruptive are the specs that restart proxies and API servers, under others' feet.
var disruptive = regexp.MustCompile(`\[Disruptive\]`)

// run has specs run that have not ended in this pass: at a stretch, because the last of them take minutes in which others could run, and then
// those that disturb others, one by one.
func (s *suite) run(ctx context.Context, cluster clusters.Testable, p pass, names []string) error {
	dir := s.dir(p)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	alone := slices.DeleteFunc(slices.Clone(names), func(name string) bool { return !disruptive.MatchString(name) })
	together := slices.DeleteFunc(slices.Clone(names), disruptive.MatchString)
	for _, stretch := range []struct {
		specs     []string
		processes int
	}{{together, s.plan.Processes}, {alone, 1}} {
		if len(stretch.specs) == 0 {
			continue
		}
		s.report.Step(fmt.Sprintf("%v: %d specs, %d at a time", p, len(stretch.specs), stretch.processes))
		took, err := s.runBatch(ctx, cluster, dir, stretch.specs, stretch.processes)
		if err != nil {
			return err
		}
		s.report.Step(fmt.Sprintf("%v: done in %v", p, took.Round(time.Second)))
	}
	return nil
}

// runBatch has specs run, so many at a time, and keeps how they ended.
func (s *suite) runBatch(ctx context.Context, cluster clusters.Testable, dir string, names []string, processes int) (took time.Duration, err error) {
	record := batch{Began: time.Now(), About: s.about(cluster)}
	ended, err := s.runGinkgo(ctx, cluster, dir, names, processes)
	took = time.Since(record.Began)
	record.Seconds = took.Seconds()
	if len(ended) == 0 {
		return took, err
	}
	// Specs that are not kept are run again, and take their time again.
	if failed := appendLines(filepath.Join(dir, endedFile), ended...); failed != nil {
		return took, errors.Join(err, failed)
	}
	return took, errors.Join(err, appendLines(filepath.Join(dir, batchesFile), record))
}

// about says with what specs are run, and on what.
func (s *suite) about(cluster clusters.Testable) string {
	env := s.plan.Environment
	versions := slices.Collect(maps.Values(cluster.Versions()))
	slices.Sort(versions)
	commit := env.Commit
	if env.Dirty {
		commit += " with changes"
	}
	return fmt.Sprintf("%s; a control plane and %d workers in %d zones; %d specs at a time, those that disturb others one by one; %d × %s, %.0f GiB, Linux %s; plimsoll %s",
		strings.Join(versions, ", "), workers, zones, s.plan.Processes, env.NumCPU, env.CPU, float64(env.MemoryBytes)/(1<<30), env.Kernel, commit)
}

// reportFile is the suite's own report of a batch.
const reportFile = "report.json"

// runGinkgo has specs run, and returns how they ended. It is an error where one of them has not.
func (s *suite) runGinkgo(ctx context.Context, cluster clusters.Testable, dir string, names []string, processes int) ([]Spec, error) {
	kubeconfig, kubectl := cluster.Administrator()
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	argv := []string{
		filepath.Join(s.plan.Bin, ginkgoFile), "run", "--no-color", "--timeout=6h", "--silence-skips", "--keep-going", "--procs=" + strconv.Itoa(processes),
		"--output-dir=" + dir, "--json-report=" + reportFile,
	}
	for _, name := range names {
		argv = append(argv, "--focus= "+regexp.QuoteMeta(name)+"$") // after the suite's own name
	}
	argv = append(argv, filepath.Join(s.plan.Bin, suiteFile), "--", "--kubeconfig="+kubeconfig, "--kubectl-path="+kubectl, "--provider=skeleton", "--num-nodes="+strconv.Itoa(workers))
	log := filepath.Join(dir, "log.txt")
	// One that a batch left that was cut off would pass for this one's.
	if err := os.RemoveAll(filepath.Join(dir, reportFile)); err != nil {
		return nil, err
	}
	s.started++
	process, err := cluster.Start(fmt.Sprintf("ginkgo-%d", s.started), argv, environment(), log)
	if err != nil {
		return nil, err
	}
	select {
	case <-ctx.Done():
		return nil, errors.Join(context.Cause(ctx), process.Close(context.WithoutCancel(ctx)))
	case <-process.Done():
	}
	b, err := os.ReadFile(filepath.Join(dir, reportFile))
	if err != nil {
		return nil, fmt.Errorf("the suite left no report, see %s: %w", log, err)
	}
	ended, err := outcomes(b)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if !slices.ContainsFunc(ended, func(e Spec) bool { return e.Name == name }) {
			err = fmt.Errorf("%q has not ended: see %s", name, log)
		}
	}
	return ended, err
}

// outcomes reads the report of Kubernetes' suite: what was run, and how it ended.
func outcomes(report []byte) (ended []Spec, err error) {
	var suites []types.Report
	if err := json.Unmarshal(report, &suites); err != nil {
		return nil, fmt.Errorf("the suite's report: %w", err)
	}
	for _, suite := range suites {
		for _, r := range suite.SpecReports {
			if r.LeafNodeType != types.NodeTypeIt || r.NumAttempts == 0 || r.State.Is(types.SpecStateInterrupted|types.SpecStateAborted) {
				continue // not chosen, or not at its end
			}
			spec := Spec{Name: r.FullText(), Outcome: Failed, Seconds: r.RunTime.Seconds(), Reason: r.Failure.Message}
			switch r.State {
			case types.SpecStatePassed:
				spec.Outcome = Passed
			case types.SpecStateSkipped:
				spec.Outcome = Skipped
			}
			ended = append(ended, spec)
		}
	}
	return ended, nil
}

// oneLine is the first line of a reason.
func oneLine(text string) string {
	line, _, _ := bytes.Cut(bytes.TrimSpace([]byte(text)), []byte("\n"))
	return string(line)
}
