// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/guest"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
	"github.com/plimsoll-bench/plimsoll/dataplane"
	"github.com/plimsoll-bench/plimsoll/results"
	"github.com/plimsoll-bench/plimsoll/scenarios"
)

// profile is a plan's ladder, rounds and limits under one name.
type profile struct {
	name, doc string
	services  []int
	rounds    int
	again     int // rounds of the smallest rung at the end
	paced     int // connects per visit and target while CPU is measured
	patience  time.Duration
	limit     time.Duration
	// In guests, where figures repeat, rounds are seeds.
	guestServices []int
	guestRounds   int
}

var profiles = []profile{
	{"quick", "a first picture", []int{100, 1000, 5000}, 6, 6, 100, 120 * time.Millisecond, 5 * time.Minute, []int{10, 1000}, 1},
	{"default", "enough rungs for every verdict", []int{100, 1000, 2000, 5000, 10000, 20000}, 10, 6, 200, 250 * time.Millisecond, 5 * time.Minute, []int{10, 100, 1000, 3000, 10000}, 2},
	{"full", "up to 50,000 Services", []int{100, 1000, 2000, 5000, 10000, 20000, 50000}, 10, 6, 200, 250 * time.Millisecond, 25 * time.Minute, []int{10, 100, 1000, 3000, 5000, 10000}, 3},
}

// guestConnects are those that a guest counts for each target: what repeats needs no more.
const guestConnects = 400

// guestProvider is the provider whose figures are instructions.
var guestProvider = guest.Provider{}.Name()

// minRounds is the fewest rounds that a median and its interval stand on.
const minRounds = 6

// runOptions are the flags of `plimsoll run` that are no part of the plan.
type runOptions struct {
	provider string
	profile  string
	plan     scenarios.Plan
	guest    guestOptions

	// Filled in by complete. A run goes to clusters of one provider, to guests, or first to the one and then to the others.
	clusters  string          // the provider's name, or autoProvider; empty for none
	guestPlan *scenarios.Plan // nil for no guests
}

func newRunCommand() *cobra.Command {
	var o runOptions
	cmd := &cobra.Command{
		Use:   "run [scenario…]",
		Short: "measure: every mode at every number of Services, round by round",
		Long: "Run stands up one node per mode, scales the Services rung by rung, measures every mode in every round, and writes\n" +
			"records, CSV, pictures and report.md into a folder. Scenarios default to all; `plimsoll list` names them.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.complete(cmd, args); err != nil {
				return err
			}
			return o.run(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.provider, "provider", "lab", "where nodes come from (plimsoll list); auto: kind where a container engine answers and a node image can be had, else lab; and guests beside them: lab,guest")
	f.StringVar(&o.profile, "profile", "default", "quick, default or full: ladder, rounds and limits that other flags change")
	f.StringSliceVar(&o.plan.Modes, "modes", []string{"direct", "direct-conntrack", "iptables", "iptables-legacy", "ipvs", "nftables", "ebpf"}, "modes to compare; ebpf-packet is another (plimsoll list), which guests have by default")
	f.IntSliceVar(&o.plan.Services, "services", nil, "numbers of Services, ascending")
	f.IntVar(&o.plan.Endpoints, "endpoints", 2, "endpoints of each Service")
	f.IntVar(&o.plan.Rounds, "rounds", 0, "visits of every mode at every rung, at least 6")
	f.Uint64Var(&o.plan.Seed, "seed", 1, "seed of the order of visits, of addresses, and of every bootstrap")
	f.StringVar(&o.plan.Out, "out", "", "folder for the results (default results/runs/TIME)")
	f.BoolVar(&o.plan.Settings.ProxyDefaults, "proxy-defaults", false, "leave each proxy at its own defaults instead of minSyncPeriod 10 ms for all")
	f.BoolVar(&o.plan.Settings.PeerNames, "peer-names", false, "have mode ebpf tell getpeername(2) of Services, at a cost for each connect and close")
	f.DurationVar(&o.plan.ProgrammingLimit, "programming-limit", 0, "how long a mode may take to carry a rung before it is skipped")
	f.StringVar(&o.plan.Bin, "bin", "", "folder with kube-apiserver, kube-proxy and etcd (default the one that this program lies in)")
	f.StringVar(&o.plan.Twin, "twin", "direct", "mode that gets a second node; the noise floor comes from the difference; empty for none")
	f.IntVar(&o.plan.Connects, "connects", 500, "connects timed per visit and target")
	f.DurationVar(&o.plan.Patience, "patience", 0, "how long a visit may wait per target for moments in which the CPU is at its full speed")
	f.StringVar(&o.plan.Cache, "cache", "", "folder of what takes long to build, the node image among it (default "+defaultCache+")")
	f.StringVar(&o.plan.NodeImage, "node-image", "", "image of kind's nodes (default kind's own pinned one; what make node-image made on the engine of make kind-engine)")
	f.BoolVar(&o.plan.Retain, "retain", false, "keep kind's clusters and say how to enter them; plimsoll clean removes them")
	f.Float64Var(&o.plan.Rate, "rate", 1000, "connects a second while CPU is measured, the same for all modes")
	o.guest.bind(f)
	f.IntVar(&o.plan.PacedConnects, "paced-connects", 0, "connects per visit and target while CPU is measured")
	return cmd
}

// complete fills in the profile under the flags that were given and refuses what makes no sense.
func (o *runOptions) complete(cmd *cobra.Command, args []string) error {
	i := slices.IndexFunc(profiles, func(p profile) bool { return p.name == o.profile })
	if i < 0 {
		return fmt.Errorf("profile %q is not one of quick, default, full", o.profile)
	}
	p, plan := profiles[i], &o.plan
	if err := o.readProvider(); err != nil {
		return err
	}
	if err := findFolders(&plan.Bin, &plan.Cache); err != nil {
		return err
	}
	for _, name := range args {
		if _, err := scenarios.Find(name); err != nil {
			return err
		}
	}
	for _, name := range plan.Modes {
		if _, err := dataplane.Find(name); err != nil {
			return err
		}
	}
	plan.Scenarios = args
	if o.guestPlan != nil {
		// Before the profile's other half fills in what is left.
		*o.guestPlan = *plan
		o.completeGuests(cmd, p)
		if err := check(cmd, o.guestPlan); err != nil {
			return err
		}
	}
	if o.clusters == "" {
		return nil
	}
	if len(plan.Services) == 0 {
		plan.Services = p.services
	}
	if plan.Rounds == 0 {
		plan.Rounds = p.rounds
	}
	if plan.ProgrammingLimit == 0 {
		plan.ProgrammingLimit = p.limit
	}
	if plan.PacedConnects == 0 {
		plan.PacedConnects = p.paced
	}
	if plan.Patience == 0 {
		plan.Patience = p.patience
	}
	plan.Again = min(p.again, plan.Rounds)
	plan.Warmup = plan.Connects / 10
	plan.Scenarios = nil
	for _, s := range scenarios.Scenarios {
		if named := slices.Contains(args, s.Name()); (named || len(args) == 0) && !scenarios.InGuests(s) {
			plan.Scenarios = append(plan.Scenarios, s.Name())
		} else if named && o.guestPlan == nil {
			return fmt.Errorf("scenario %s is for guests alone (--provider guest)", s.Name())
		}
	}
	switch {
	case plan.Rounds < minRounds:
		return fmt.Errorf("--rounds %d: at least %d are needed for a median with an interval", plan.Rounds, minRounds)
	case plan.PacedConnects < 10 || plan.Rate <= 0:
		return errors.New("--connects and --paced-connects want at least 10, --rate more than 0")
	case plan.Patience < 0 || plan.ProgrammingLimit < 0:
		return errors.New("--patience and --programming-limit want times above 0, such as 250ms or 5m")
	}
	for _, name := range []string{"etcd", "kube-apiserver", "kube-proxy"} {
		if _, err := os.Stat(filepath.Join(plan.Bin, name)); err != nil {
			return fmt.Errorf("%s is not in %s: make build makes it", name, plan.Bin)
		}
	}
	return check(cmd, plan)
}

// defaultCache says which folder host.CacheDir is.
const defaultCache = "$" + host.CacheVariable + ", or the user's cache"

// findFolders fills in the folders of programs and of the cache where none were given.
func findFolders(bin, cache *string) (err error) {
	if *bin == "" {
		if *bin, err = binaries(); err != nil {
			return err
		}
	}
	if *cache == "" {
		*cache, err = host.CacheDir()
	}
	return err
}

// readProvider reads --provider: the name of one, or of two of which the second is the guests'.
func (o *runOptions) readProvider() error {
	first, second, two := strings.Cut(o.provider, ",")
	if two && second != guestProvider {
		return fmt.Errorf("provider %q: only %s goes beside another one, after it", o.provider, guestProvider)
	}
	if first == guestProvider && !two || second == guestProvider {
		o.guestPlan = new(scenarios.Plan)
	}
	if first == guestProvider {
		return nil
	}
	if o.clusters = first; first == autoProvider {
		return nil
	}
	_, err := findProvider(first)
	return err
}

// completeGuests fills in what guests do under the flags that were given.
func (o *runOptions) completeGuests(cmd *cobra.Command, p profile) {
	plan, changed := o.guestPlan, cmd.Flags().Changed
	if len(plan.Services) == 0 {
		plan.Services = p.guestServices
	}
	if plan.Rounds == 0 || o.clusters != "" { // whose rounds are another thing
		plan.Rounds = p.guestRounds
	}
	if !changed("connects") {
		plan.Connects = guestConnects
	}
	if !changed("modes") {
		plan.Modes = nil
		for _, m := range dataplane.Modes {
			plan.Modes = append(plan.Modes, m.Name())
		}
	}
	if len(plan.Scenarios) == 0 {
		for _, s := range scenarios.Scenarios {
			plan.Scenarios = append(plan.Scenarios, s.Name())
		}
	}
}

// twice tells whether something stands in a list more than once.
func twice[T cmp.Ordered](list []T) bool {
	return len(slices.Compact(slices.Sorted(slices.Values(list)))) != len(list)
}

// check refuses a plan that makes no sense anywhere.
func check(cmd *cobra.Command, plan *scenarios.Plan) error {
	switch {
	case len(plan.Modes) == 0:
		return errors.New("--modes: at least one is needed (plimsoll list)")
	case twice(plan.Scenarios):
		return fmt.Errorf("scenarios %v: one is named twice", plan.Scenarios)
	case plan.Rounds < 1:
		return fmt.Errorf("--rounds %d: want at least 1", plan.Rounds)
	case plan.Endpoints < 1:
		return fmt.Errorf("--endpoints %d: at least 1 is needed to connect to", plan.Endpoints)
	case plan.Connects < 10:
		return errors.New("--connects and --paced-connects want at least 10, --rate more than 0")
	case !slices.IsSorted(plan.Services) || len(slices.Compact(slices.Clone(plan.Services))) != len(plan.Services) || plan.Services[0] < 1:
		return fmt.Errorf("--services %v: want ascending numbers from 1 on", plan.Services)
	case plan.Services[len(plan.Services)-1] > 65000:
		return fmt.Errorf("--services %d: the Service range of a lab holds 65000", plan.Services[len(plan.Services)-1])
	case twice(plan.Modes):
		return fmt.Errorf("--modes %v: a mode is named twice", plan.Modes)
	case plan.Twin != "" && !slices.Contains(plan.Modes, plan.Twin):
		if cmd.Flags().Changed("twin") {
			return fmt.Errorf("--twin %s is not among --modes", plan.Twin)
		}
		plan.Twin = plan.Modes[0]
	}
	return nil
}

func (o *runOptions) run(ctx context.Context, stdout, stderr io.Writer) (err error) {
	if os.Geteuid() != 0 && o.clusters != "" {
		return errors.New("measuring makes network namespaces and loads BPF programs: run it as root (sudo)")
	}
	now := time.Now()
	if o.plan.Out == "" {
		o.plan.Out = filepath.Join("results", "runs", now.UTC().Format("20060102-150405"))
	}
	if err := makeOut(o.plan.Out); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, giveBack(o.plan.Out)) }()
	o.plan.Run = runName()
	if o.guestPlan != nil {
		o.guestPlan.Out = o.plan.Out
	}
	env := describeHost(ctx, o.plan.Bin)
	env.Run, env.Seed, env.Start, env.Command = o.plan.Run, int64(o.plan.Seed), now, os.Args
	env.Settings = map[string]string{
		"proxy":    "like for like: minSyncPeriod 10 ms everywhere",
		"connects": strconv.Itoa(o.plan.Connects), "paced-connects": strconv.Itoa(o.plan.PacedConnects),
		"patience": o.plan.Patience.String(), "rate": fmt.Sprintf("%g connects/s", o.plan.Rate), "programming-limit": o.plan.ProgrammingLimit.String(),
	}
	if o.plan.Settings.ProxyDefaults {
		env.Settings["proxy"] = "each proxy's own defaults"
	}
	if o.plan.Settings.PeerNames {
		env.Settings["proxy"] += "; getpeername(2) names Services in mode ebpf"
	}

	progress, err := newProgress(stderr, o.plan.Out)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, progress.close()) }()
	// The Kubernetes libraries log what they try again; a person at the terminal need not see it.
	klog.LogToStderr(false)
	klog.SetOutput(progress.log)
	progress.Step(fmt.Sprintf("run %s: results go to %s", o.plan.Run, o.plan.Out))
	modules := loadedModules()
	if o.clusters != "" {
		err = scenarios.Run(ctx, o.plan, o.findClusters(ctx, progress), env, progress)
	}
	if err == nil && o.guestPlan != nil {
		err = o.count(ctx, env, progress)
	}
	if err != nil {
		progress.write("error: " + err.Error())
	}
	if loaded := newModules(modules, loadedModules()); len(loaded) > 0 {
		progress.Step("kernel modules that this run made the kernel load: " + strings.Join(loaded, ", "))
	}
	// What was measured before an interrupt or an error is worth a report too.
	if _, stat := os.Stat(filepath.Join(o.plan.Out, results.RecordsFile)); stat == nil {
		progress.Step("rendering the report")
		err = errors.Join(err, render(o.plan.Out))
	}
	if err == nil {
		progress.Step(fmt.Sprintf("done in %s", time.Since(now).Round(time.Second)))
		fmt.Fprintln(stdout, filepath.Join(o.plan.Out, results.ReportFile))
	}
	return err
}

// findClusters is the provider of clusters.
func (o *runOptions) findClusters(ctx context.Context, report scenarios.Reporter) clusters.Provider {
	if p, err := findProvider(o.clusters); err == nil {
		return p
	}
	p, said := chooseProvider(ctx, o.plan)
	report.Step(said)
	return p
}

// count carries the plan of guests out, beside what clusters have given, where they have. Without QEMU or a kernel its rows say so.
func (o *runOptions) count(ctx context.Context, env results.Environment, report scenarios.Reporter) error {
	g, err := prepareGuests(ctx, o.guest, *o.guestPlan, report)
	if err != nil && !errors.Is(err, clusters.ErrNotSupported) {
		return err
	}
	if err != nil {
		report.Warn(fmt.Sprintf("no guests: %v", err))
	}
	env.Run, env.CPU, env.NumCPU, env.MemoryBytes, env.Sysctls = fmt.Sprintf("guests-%d", o.guestPlan.Seed), "QEMU's, an instruction a nanosecond", 1, int64(o.guest.memory)<<20, nil
	env.Extra = map[string]string{"guests": fmt.Sprintf("recipe %s, at %v Services, rounds of seeds %d to %d", g.machine.Recipe(), o.guestPlan.Services, o.guestPlan.Seed, o.guestPlan.Seed+uint64(o.guestPlan.Rounds)-1)}
	env.Settings = map[string]string{"proxy": env.Settings["proxy"], "connects": strconv.Itoa(o.guestPlan.Connects)}
	return g.count(ctx, *o.guestPlan, o.guest, env, report)
}

// runName is short, unique, and fit for a file's or a cgroup's name.
func runName() string {
	var b [4]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// makeOut makes the results' folder, which must be new or empty: a run never writes over another.
func makeOut(dir string) error {
	entries, err := os.ReadDir(dir)
	if err == nil && len(entries) > 0 {
		return fmt.Errorf("--out %s is not empty: results are never written over", dir)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("--out: %w", err)
	}
	if err := results.MakeDir(dir); err != nil {
		return fmt.Errorf("--out: %w", err)
	}
	return nil
}

// giveBack hands the results to the user who called sudo.
func giveBack(dir string) error {
	return filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return results.Own(path)
	})
}
