// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/dataplane"
	"github.com/plimsoll-bench/plimsoll/results"
	"github.com/plimsoll-bench/plimsoll/scenarios/fleet"
	"github.com/plimsoll-bench/plimsoll/scenarios/load"
	"github.com/plimsoll-bench/plimsoll/scenarios/meters"
)

// A Cell is what one guest does: one mode at one rung, all scenarios. There a nanosecond is an instruction, and what takes time but no
// instruction is waiting.
type Cell struct {
	Mode      string             `json:"mode"`
	Name      string             `json:"name"` // the mode's, or its twin's
	Scenarios []string           `json:"scenarios"`
	Services  int                `json:"services"`
	Endpoints int                `json:"endpoints"`
	Round     int                `json:"round"`
	Seed      uint64             `json:"seed"`
	Connects  int                `json:"connects"`
	Settings  dataplane.Settings `json:"settings"`
}

// cellLimit is how long a mode may take to carry a rung by the guest's clock. The host's own limit comes first for one that computes.
const cellLimit = 2 * time.Hour

// Do does the cell's work in the guest that provider opens, and writes its records with their counts, one JSON object a line.
func (c Cell) Do(ctx context.Context, provider clusters.Provider, out io.Writer) (err error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	encoder := json.NewEncoder(out)
	g := &counting{
		cell: c, rung: &rung{services: c.Services},
		write: func(l line) error { return encoder.Encode(l) },
		bench: &bench{provider: provider, report: console{}, kernel: kernelVersion(unix.ByteSliceToString(uts.Release[:])), plan: Plan{Endpoints: c.Endpoints, ProgrammingLimit: cellLimit, Seed: c.Seed}},
	}
	if g.bench.scenarios, err = findAll(c.Scenarios); err != nil {
		return err
	}
	mode, err := dataplane.Find(c.Mode)
	if err != nil {
		return err
	}
	if err := mode.Supported(ctx); errors.Is(err, clusters.ErrNotSupported) {
		return g.skip(clusters.Reason(err))
	} else if err != nil {
		return err
	}
	spec := mode.Spec(c.Settings)
	made, err := provider.Create(ctx, clusters.Plan{Name: "guest", Dir: "/run/guest", Sites: []clusters.ProxySpec{spec}, Static: true, Progress: tell})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, made[0].Close(context.WithoutCancel(ctx))) }()
	g.site = &site{Site: made[0].Sites()[0], mode: mode, name: c.Mode, cluster: &population{Cluster: made[0], numbers: map[netip.AddrPort]int{}}}
	if err := g.site.Err(); err != nil {
		return g.skip(clusters.Reason(err))
	}
	if g.site.load, err = startLoad(ctx, g.site); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.site.load.close(context.WithoutCancel(ctx))) }()
	return g.count(ctx)
}

// tell says on the guest's console what is being done, and when by its clock.
func tell(what string) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return // there is no such system
	}
	fmt.Printf("[%12.6f] %s\n", float64(now.Nano())/1e9, what)
}

// console is the Reporter of a cell.
type console struct{}

var _ Reporter = console{}

func (console) Step(what string)               { tell(what) }
func (console) Progress(_, _ int, what string) { tell(what) }
func (console) Warn(what string)               { tell("warning: " + what) }

// counting is a cell at work.
type counting struct {
	cell  Cell
	bench *bench
	rung  *rung
	site  *site
	write func(line) error
}

// A line is what a guest writes: a record, and what each operation took that it sums up, in their order.
type line struct {
	results.Record
	Counts []int64 `json:",omitempty"` // instructions
}

// count grows the fleet and does the scenarios.
func (g *counting) count(ctx context.Context) error {
	client, err := kubernetes.NewForConfig(g.site.cluster.RESTConfig())
	if err != nil {
		return err
	}
	c := g.site.cluster
	writer, ok := c.Cluster.(clusters.Writer)
	if !ok {
		return errors.New("the guest's cluster takes no objects")
	}
	var objects []runtime.Object
	c.fleet, objects, err = fleet.Fixed(fleet.Plan{
		Namespace: "plimsoll", Endpoints: g.cell.Endpoints, Port: servicePort, TargetPort: backendPort,
		EndpointPrefixes: g.site.EndpointPrefixes(), ServiceCIDR: c.ServiceCIDR(), Seed: g.cell.Seed,
	}, g.cell.Services)
	if err != nil {
		return err
	}
	for i := range g.cell.Services {
		c.numbers[c.fleet.Service(i).Address] = i
	}
	proxied := g.site.ProxyCgroup() != ""
	if proxied {
		if g.site.base, err = g.site.awaitBase(ctx); err != nil {
			return err
		}
	}
	if err := g.site.freeze(ctx); err != nil {
		return err
	}
	tell("writing Services")
	if err := writer.Write(objects); err != nil {
		return err
	}
	if err := g.site.thaw(ctx); err != nil {
		return err
	}
	if proxied {
		if done, err := g.program(ctx); err != nil || !done {
			return err
		}
	}
	if g.site.chain, err = g.bench.readChain(ctx, g.site); err != nil {
		return err
	}
	g.rung.sites = []*site{g.site}
	rng := rand.New(rand.NewPCG(g.cell.Seed, uint64(g.cell.Services)<<20|uint64(g.cell.Round)))
	if err := g.countConnects(ctx, rng); err != nil {
		return err
	}
	return g.countProbes(ctx, client, rng)
}

// forgetTime is longer than IPVS remembers a connection that was reset (10 s, IP_VS_TCP_S_CLOSE). Until then it takes what a backend answers to
// the same port of the client for that connection's, and rewrites it: a connect to the backend's own address times out.
const forgetTime = 12 * time.Second

// countConnects does the scenarios of the fleet.
func (g *counting) countConnects(ctx context.Context, rng *rand.Rand) error {
	for _, sc := range g.bench.scenarios {
		sc, ok := sc.(connecting)
		if !ok {
			continue
		}
		if !sc.ThroughService() && g.site.ProxyCgroup() != "" {
			time.Sleep(forgetTime) // of which the host notices nothing
			if err := g.site.rest(ctx); err != nil {
				return err
			}
		}
		for _, target := range sc.Targets() {
			connects := g.cell.Connects * sc.Spread(target)
			services := sc.Services(g.rung, g.site, target, rng, connects)
			err := g.countTarget(ctx, sc, target, g.site.load.client, load.Request{
				Addresses: g.site.addresses(services, sc.ThroughService() && g.site.mode.Floor() != ""), Count: connects, Seed: rng.Uint64(),
			})
			if err != nil {
				return err
			}
		}
	}
	chain, err := g.bench.readChain(ctx, g.site)
	if err == nil && !slices.Equal(chain, g.site.chain) {
		err = errors.New("the order of the chain changed") // what is deterministic is not done again
	}
	return err
}

// countProbes does the scenarios of the probes, where there are any.
func (g *counting) countProbes(ctx context.Context, client kubernetes.Interface, rng *rand.Rand) (err error) {
	if !slices.ContainsFunc(g.bench.scenarios, InGuests) {
		return nil
	}
	tell("adding probes")
	p, err := addProbes(ctx, g.site, client)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close(context.WithoutCancel(ctx))) }()
	if p.added > 0 {
		record := g.record(programming, "one")
		record.Count, record.Values = 1, []results.Value{{Metric: "added", Unit: virtualSeconds, Value: p.added.Seconds()}}
		if err := g.write(line{Record: record}); err != nil {
			return err
		}
		if err := g.site.rest(ctx); err != nil {
			return err
		}
	}
	for _, sc := range g.bench.scenarios {
		sc, ok := sc.(probing)
		if !ok {
			continue
		}
		for _, target := range sc.Targets() {
			request, outside := sc.request(p, target)
			request.Count, request.Seed = g.cell.Connects, rng.Uint64()
			driver := g.site.load.client
			if outside {
				driver = p.outside
			}
			if outside && !g.site.carriesNodePorts() {
				record := g.record(sc.Name(), target)
				record.Skipped = "sockets alone are translated: nobody beyond the node reaches a NodePort"
				err = g.write(line{Record: record})
			} else {
				err = g.countTarget(ctx, sc, target, driver, request)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// program waits until the proxy carries the rung and is at rest. It returns false where it does not, which the records say.
func (g *counting) program(ctx context.Context) (bool, error) {
	tell("awaiting the proxy")
	p, err := g.bench.awaitProgrammed(ctx, g.site, g.rung)
	if err != nil {
		return false, err
	}
	if p.failed != "" {
		return false, g.skip(p.failed)
	}
	memory, err := meters.ReadMemory(g.site.ProxyCgroup())
	if err != nil {
		return false, err
	}
	record := g.record(programming, "fleet")
	record.Count = int64(g.cell.Services)
	record.Values = []results.Value{
		{Metric: "programming", Unit: virtualSeconds, Value: p.took.Seconds()},
		{Metric: "proxy-programming-cpu", Unit: virtualSeconds, Value: p.cpu.Seconds()},
		{Metric: "proxy-rss", Unit: "bytes", Value: float64(memory.RSS)},
	}
	if err := g.write(line{Record: record}); err != nil {
		return false, err
	}
	time.Sleep(putOff) // of which the host notices nothing
	return true, g.site.rest(ctx)
}

// putOff is longer than what a proxy puts off once it carries Services: the agent has its table drop what conntrack takes for invalid from 10 s
// after its start on, which is a rule more for each packet that is translated there.
const putOff = 12 * time.Second

// Units of a guest. Its seconds are instructions and waiting together.
const (
	instructions   = "instructions"
	virtualSeconds = "virtual_s"
)

// countTarget counts the instructions of what a client does.
func (g *counting) countTarget(ctx context.Context, sc Scenario, target string, client *load.Driver, request load.Request) error {
	tell(sc.Name() + " " + target)
	// As many as are counted: where nothing was ever connected, or not for long, the first hundred or two take some 3,000 instructions more.
	request.Warmup, request.Timeout = request.Count, connectTimeout
	request.Alone = true
	reply, err := client.Do(ctx, request)
	if err != nil {
		return fmt.Errorf("%s %s: %w", sc.Name(), target, err)
	}
	record := g.record(sc.Name(), target)
	record.Count, record.Errors = int64(len(reply.Latencies)), reply.Failed()
	record.Warnings = append(record.Warnings, failures(reply)...)
	if len(reply.Latencies) > 0 {
		// Higher percentiles are timer ticks and what else the kernel does meanwhile.
		record.Values = []results.Value{
			{Metric: "p50", Unit: instructions, Value: float64(load.Summarize(reply.Latencies).P50)},
			{Metric: "min", Unit: instructions, Value: float64(slices.Min(reply.Latencies))},
		}
	}
	if g.site.Spec().Agent {
		hook, err := g.countPrograms(ctx, client, request)
		if err != nil {
			return fmt.Errorf("%s %s: %w", sc.Name(), target, err)
		}
		record.Values = append(record.Values, results.Value{Metric: "hook", Unit: instructions, Value: hook})
	}
	return g.write(line{Record: record, Counts: reply.Latencies})
}

// hookBatches is how many times BPF programs are counted. The least counts: a timer's tick that falls into a program is no part of it.
const hookBatches = 5

// countPrograms has a client do the same again, in batches, and returns what the node's BPF programs take of each operation on average of a batch.
func (g *counting) countPrograms(ctx context.Context, client *load.Driver, request load.Request) (least float64, err error) {
	programs, err := meters.StartPrograms()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, programs.Close()) }()
	request.Warmup, request.Count = 0, max(1, request.Count/hookBatches)
	least = math.Inf(1)
	for range hookBatches {
		if err := client.Prepare(ctx, request); err != nil {
			return 0, err
		}
		before, err := programs.Used()
		if err != nil {
			return 0, err
		}
		if err := client.Run(ctx); err != nil {
			return 0, err
		}
		after, err := programs.Used()
		if err != nil {
			return 0, err
		}
		if _, err := client.Collect(ctx); err != nil {
			return 0, err
		}
		least = min(least, float64(after-before)/float64(request.Count))
		request.Seed++
	}
	return least, nil
}

func (g *counting) record(scenario, target string) results.Record {
	return g.bench.record(g.rung, scenario, g.cell.Name, target, g.cell.Round)
}

// skip writes that there is nothing to count.
func (g *counting) skip(why string) error {
	for _, r := range g.bench.skips(g.rung, g.cell.Name, why) {
		if err := g.write(line{Record: r}); err != nil {
			return err
		}
	}
	return nil
}
