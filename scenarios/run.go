// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/dataplane"
	"github.com/plimsoll-bench/plimsoll/results"
	"github.com/plimsoll-bench/plimsoll/scenarios/fleet"
	"github.com/plimsoll-bench/plimsoll/scenarios/load"
)

// A Plan is what a run sets out to do. Flags of the command line bind onto its fields.
type Plan struct {
	// Run names the run and all that it makes on the host.
	Run       string
	Scenarios []string
	Modes     []string
	// Services is the ladder: the numbers of Services to visit, ascending.
	Services  []int
	Endpoints int
	Rounds    int
	// Again is how many rounds the smallest rung gets when it is visited again at the end.
	Again int
	Seed  uint64
	// Connects is how many connects a visit times for each target in a closed loop, after Warmup unrecorded ones.
	Connects, Warmup int
	// Patience is how long a visit may wait for quiet moments for each of its targets. What one does not need the later ones
	// have: a busy hour makes a run longer by so much and no more.
	Patience time.Duration
	// Rate is the pace, in connects a second, at which CPU is measured, the same for all modes; PacedConnects how many.
	Rate          float64
	PacedConnects int
	// ProgrammingLimit is how long a mode may take to carry a rung's Services.
	ProgrammingLimit time.Duration
	// Twin is the mode that gets a second node, for the A/A comparison that the noise floor comes from.
	Twin     string
	Settings dataplane.Settings
	// Bin holds kube-apiserver, kube-proxy and etcd; Program is the plimsoll binary for pods and agents, empty for this one.
	Bin, Program string
	// Cache is the folder of heavy builds; NodeImage and Retain are the provider's.
	Cache, NodeImage string
	Retain           bool
	// Out is the run's folder.
	Out string
}

// TwinSuffix is added to a mode's name for its second node.
const TwinSuffix = "-twin"

// A Reporter is told how a run goes. Calls come from one goroutine at a time.
type Reporter interface {
	// Step says what is being done now.
	Step(what string)
	// Progress says how far the run is: visits done of total, and what is visited.
	Progress(done, total int, what string)
	// Warn says what makes results doubtful.
	Warn(what string)
}

// population is one cluster with the fleet that it holds. Fleets of one run differ in nothing but, perhaps, their addresses.
type population struct {
	clusters.Cluster
	fleet   *fleet.Fleet
	numbers map[netip.AddrPort]int // Service address → number in the fleet
	timing  fleet.Timing           // of the rung at hand
}

// site is one node of the run with its load and what is known of its chain.
type site struct {
	clusters.Site
	cluster *population
	mode    dataplane.Mode
	// name is the mode's, or its twin's.
	name string
	load *siteLoad
	// base is the number of Service ports that the site carries without the fleet.
	base int
	// chain is the fleet's Services in the order in which the kernel tries them, as numbers in the fleet; nil without a chain.
	chain []int
	// lost says why the site is out of the run: its proxy does not serve, or did not carry an earlier rung in time.
	lost string
}

// rung is one value of N.
type rung struct {
	services int
	rounds   int
	again    bool
	sites    []*site  // those that carry it
	warnings []string // doubts about all of it
	repeats  int      // work that was done again
}

// bench is a run at work.
type bench struct {
	plan      Plan
	provider  clusters.Provider
	scenarios []Scenario
	report    Reporter
	writer    *results.Writer
	samples   *samples
	env       results.Environment
	kernel    string
	clusters  []*population
	sites     []*site
	skipped   map[string]string // mode → reason
	rand      *rand.Rand
	// quiet is the slowest reading of the clients' reference at which connects count at this rung.
	quiet time.Duration
	// patience is how long the next target may wait for a CPU at its full speed: what the ones before have left.
	patience time.Duration
	done     int // visits
	total    int // visits, when no site falls out
}

// Run carries a plan out and leaves records.txt, environment.json and the raw samples in plan.Out; env gives what the caller
// knows of the host. On an error, an interrupt among them, what was measured so far is in the folder, and nothing is left on
// the host.
func Run(ctx context.Context, plan Plan, provider clusters.Provider, env results.Environment, report Reporter) (err error) {
	b := &bench{plan: plan, provider: provider, env: env, report: report, skipped: map[string]string{}}
	b.rand = rand.New(rand.NewPCG(plan.Seed, 1))
	b.kernel = kernelVersion(env.Kernel)
	if err := b.prepare(ctx); err != nil {
		return err
	}
	if b.writer, err = results.Create(plan.Out, b.env); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.writer.Close()) }()
	if b.samples, err = createSamples(plan.Out, SamplesFile); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.samples.close()) }()

	if err := b.open(ctx); err != nil {
		return err
	}
	defer func() {
		report.Step("removing what the run made")
		err = errors.Join(err, b.close(context.WithoutCancel(ctx)))
	}()
	// A dead control plane ends the run with its own words instead of a time-out.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	for _, c := range b.clusters {
		go func() {
			select {
			case <-c.Failed():
				cancel(c.Err())
			case <-ctx.Done():
			}
		}()
	}
	if err := b.climb(ctx); err != nil {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			err = cause
		}
		return err
	}
	b.env.End = time.Now()
	return b.writer.Finish(b.env)
}

// prepare resolves names and asks this host what it carries.
func (b *bench) prepare(ctx context.Context) error {
	var err error
	if b.scenarios, err = findAll(b.plan.Scenarios); err != nil {
		return err
	}
	if i := slices.IndexFunc(b.scenarios, InGuests); i >= 0 {
		return fmt.Errorf("scenario %s is for guests alone (--provider guest)", b.scenarios[i].Name())
	}
	for _, name := range b.plan.Modes {
		m, err := dataplane.Find(name)
		if err != nil {
			return err
		}
		described := results.Mode{Name: m.Name(), Doc: m.Doc(), Floor: m.Floor()}
		b.env.Modes = append(b.env.Modes, described)
		err = m.Supported(ctx)
		if err == nil {
			err = b.provider.Supports(m.Spec(b.plan.Settings))
		}
		if errors.Is(err, clusters.ErrNotSupported) {
			b.skipped[m.Name()] = clusters.Reason(err)
			continue
		}
		if err != nil {
			return fmt.Errorf("mode %s: %w", m.Name(), err)
		}
		b.sites = append(b.sites, &site{mode: m, name: m.Name()})
		if m.Name() == b.plan.Twin {
			described.Name += TwinSuffix
			described.Doc, described.Twin = m.Name()+" on a second node; the difference between the two is noise", m.Name()
			b.env.Modes = append(b.env.Modes, described)
			b.sites = append(b.sites, &site{mode: m, name: described.Name})
		}
	}
	if len(b.sites) == 0 {
		return fmt.Errorf("no mode of %v runs here: %v", b.plan.Modes, b.skipped)
	}
	b.env.Plan = results.Plan{Scenarios: b.plan.Scenarios, Services: b.plan.Services, Endpoints: b.plan.Endpoints, Rounds: b.plan.Rounds, Rate: b.plan.Rate}
	return nil
}

// open creates the clusters, starts clients and servers, and makes empty fleets.
func (b *bench) open(ctx context.Context) error {
	specs := make([]clusters.ProxySpec, len(b.sites))
	for i, s := range b.sites {
		specs[i] = s.mode.Spec(b.plan.Settings)
		specs[i].Name = s.name
	}
	made, err := b.provider.Create(ctx, clusters.Plan{
		Name: b.plan.Run, Dir: filepath.Join(b.plan.Out, "logs"), Bin: b.plan.Bin, Program: b.plan.Program, Sites: specs, Progress: b.report.Step,
		Cache: b.plan.Cache, NodeImage: b.plan.NodeImage, Static: true, Retain: b.plan.Retain,
	})
	if err != nil {
		return fmt.Errorf("provider %s: %w", b.provider.Name(), err)
	}
	named := map[string]*site{}
	for _, s := range b.sites {
		named[s.name] = s
	}
	for _, c := range made {
		p := &population{Cluster: c, numbers: map[netip.AddrPort]int{}}
		b.clusters = append(b.clusters, p)
		maps.Copy(b.env.Versions, c.Versions())
		for _, s := range c.Sites() {
			named[s.Spec().Name].Site, named[s.Spec().Name].cluster = s, p
		}
	}
	if err := b.populate(ctx); err != nil {
		return errors.Join(err, b.close(context.WithoutCancel(ctx)))
	}
	return nil
}

func (b *bench) populate(ctx context.Context) error {
	b.report.Step("starting clients and servers")
	for _, s := range b.sites {
		var err error
		if s.load, err = startLoad(ctx, s); err != nil {
			return fmt.Errorf("load on %s: %w", s.name, err)
		}
	}
	for _, c := range b.clusters {
		client, err := kubernetes.NewForConfig(c.RESTConfig())
		if err != nil {
			return err
		}
		c.fleet, err = fleet.New(ctx, client, c.Etcd(), "/registry", fleet.Plan{
			Namespace: "plimsoll", Endpoints: b.plan.Endpoints, Port: servicePort, TargetPort: backendPort,
			EndpointPrefixes: c.Sites()[0].EndpointPrefixes(), ServiceCIDR: c.ServiceCIDR(), Seed: b.plan.Seed,
		})
		if err != nil {
			return err
		}
	}
	for _, s := range b.sites {
		if s.Err() == nil {
			if s.ProxyCgroup() == "" {
				continue
			}
			var err error
			if s.base, err = s.awaitBase(ctx); err == nil {
				continue
			}
			if ctx.Err() != nil || s.Err() == nil {
				return err
			}
		}
		// A mode whose proxy does not come up is a result; the others go on.
		s.lost = clusters.Reason(s.Err())
		b.report.Warn(fmt.Sprintf("%s: %s; it is out of the run", s.name, s.lost))
	}
	return nil
}

// baseLimit is how long a proxy may take for its first sync.
const baseLimit = time.Minute

// awaitBase counts the Service ports that the site carries before the fleet: the API server's own Service, once the proxy has
// made its first sync.
func (s *site) awaitBase(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, baseLimit)
	defer cancel()
	var last error
	for {
		if err := s.Err(); err != nil {
			return 0, err
		}
		n, err := s.mode.Programmed(ctx, s.Site)
		if n > 0 {
			return n, nil
		}
		if err != nil && ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			if last != nil {
				return 0, fmt.Errorf("%s made no first sync in %s: %w", s.name, baseLimit, last)
			}
			return 0, fmt.Errorf("%s made no first sync in %s: %w", s.name, baseLimit, context.Cause(ctx))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// close ends the load and the clusters.
func (b *bench) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	var errs []error
	for _, s := range b.sites {
		if s.load != nil {
			// A site that is frozen cannot end in good order.
			errs = append(errs, s.thaw(ctx), s.load.close(ctx))
		}
	}
	for _, c := range b.clusters {
		if c.fleet != nil {
			c.fleet.Close()
		}
		errs = append(errs, c.Close(ctx))
	}
	return errors.Join(errs...)
}

// climb visits the rungs in ascending order, and the smallest once more at the end.
func (b *bench) climb(ctx context.Context) error {
	rungs := make([]*rung, 0, len(b.plan.Services)+1)
	for _, n := range b.plan.Services {
		rungs = append(rungs, &rung{services: n, rounds: b.plan.Rounds})
	}
	if len(rungs) > 1 && b.plan.Again > 0 {
		rungs = append(rungs, &rung{services: b.plan.Services[0], rounds: b.plan.Again, again: true})
	}
	for _, r := range rungs {
		b.total += r.rounds * len(b.sites)
	}
	for _, r := range rungs {
		if err := b.visitRung(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

// visitRung brings every site to the rung, waits until all is at rest, and goes the rounds. It leaves the sites frozen.
func (b *bench) visitRung(ctx context.Context, r *rung) error {
	if err := b.program(ctx, r); err != nil {
		return fmt.Errorf("%d Services: %w", r.services, err)
	}
	if err := b.rest(ctx, r); err != nil {
		return err
	}
	if err := b.readChains(ctx, r); err != nil {
		return err
	}
	if err := b.freezeAll(ctx, true); err != nil {
		return err
	}
	if err := b.quietAll(ctx, true); err != nil {
		return err
	}
	if err := b.calibrate(ctx); err != nil {
		return err
	}
	for round := range r.rounds {
		if err := b.goRound(ctx, r, round); err != nil {
			return fmt.Errorf("%d Services, round %d: %w", r.services, round+1, err)
		}
	}
	return nil
}

// calibrateFor is how long a rung's calibration connects: several of the spells of a second or two for which a CPU may be slow.
const calibrateFor = 4 * time.Second

// calibrate finds how fast the CPU must be for connects to count, for all sites alike, by connects that no mode takes part in: to
// backends' own addresses on a floor's node, where the run has one.
func (b *bench) calibrate(ctx context.Context) error {
	var s *site
	for _, candidate := range b.sites {
		if candidate.lost == "" && (s == nil || s.mode.Floor() != "" && candidate.mode.Floor() == "") {
			s = candidate
		}
	}
	if s == nil {
		return nil // nobody is left to be visited
	}
	if err := s.thaw(ctx); err != nil {
		return err
	}
	reply, err := s.load.client.Do(ctx, load.Request{
		Kind: load.Calibrate, Addresses: s.addresses([]int{0}, false), Seed: b.plan.Seed, Count: 1000, Warmup: 1000, Timeout: connectTimeout,
		Limit: calibrateFor,
	})
	if err != nil {
		return fmt.Errorf("%s: %w", s.name, err)
	}
	b.quiet = reply.Quiet
	b.report.Step(fmt.Sprintf("connects count while a reference takes at most %.2f µs", float64(b.quiet)/1e3))
	return s.freeze(ctx)
}

// goRound visits every site of the rung once, in random order. What was disturbed is done again at the end of the round, by
// when it may have passed.
func (b *bench) goRound(ctx context.Context, r *rung, round int) error {
	todo := b.work(r, round)
	budget := repeatShare * float64(r.rounds*len(r.sites)*len(todo))
	type turn struct {
		site    *site
		todo    []work
		attempt int
	}
	var queue []turn
	for _, i := range b.rand.Perm(len(r.sites)) {
		queue = append(queue, turn{r.sites[i], todo, 1})
	}
	for len(queue) > 0 {
		t := queue[0]
		queue = queue[1:]
		if err := t.site.Err(); err != nil && t.site.lost == "" {
			// What was measured while the proxy lived stands.
			if err := b.lose(ctx, r, t.site, clusters.Reason(err)); err != nil {
				return err
			}
			r.sites = slices.DeleteFunc(r.sites, func(s *site) bool { return s == t.site })
		}
		if t.site.lost != "" {
			continue
		}
		b.report.Progress(b.done, b.total, fmt.Sprintf("%d Services, round %d of %d: %s", r.services, round+1, r.rounds, t.site.name))
		left, err := b.visit(ctx, r, t.site, round, t.todo, t.attempt < attempts && float64(r.repeats) < budget)
		if err != nil {
			return fmt.Errorf("%s: %w", t.site.name, err)
		}
		if len(left) > 0 {
			r.repeats += len(left)
			queue = append(queue, turn{t.site, left, t.attempt + 1})
			continue
		}
		b.done++
	}
	b.done += len(b.sites) - len(r.sites)
	return nil
}

// freezeAll stops or resumes all sites; those out of the run stay as they are.
func (b *bench) freezeAll(ctx context.Context, frozen bool) error {
	for _, s := range b.sites {
		if s.lost != "" {
			continue
		}
		change := s.thaw
		if frozen {
			change = s.freeze
		}
		if err := change(ctx); err != nil {
			return err
		}
	}
	return nil
}

// quietAll stops what nodes do of their own accord, or lets it go on.
func (b *bench) quietAll(ctx context.Context, quiet bool) error {
	for _, c := range b.clusters {
		if err := c.Quiet(ctx, quiet); err != nil {
			return err
		}
	}
	return nil
}

// thaw lets a site and its control plane go on.
func (s *site) thaw(ctx context.Context) error {
	return errors.Join(s.cluster.Pause(ctx, false), s.Freeze(ctx, false))
}

// freeze stops a site, and its control plane where no other site needs it.
func (s *site) freeze(ctx context.Context) error {
	return errors.Join(s.Freeze(ctx, true), s.cluster.Pause(ctx, true))
}

// record fills in what all records of a rung share.
func (b *bench) record(r *rung, scenario, mode, target string, round int) results.Record {
	return results.Record{
		Scenario: scenario, Provider: b.provider.Name(), Kernel: b.kernel, Mode: mode, Target: target,
		Services: r.services, Endpoints: b.plan.Endpoints, Round: round, Again: r.again, Warnings: slices.Clone(r.warnings),
	}
}
