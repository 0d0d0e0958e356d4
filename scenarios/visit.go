// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/plimsoll-bench/plimsoll/results"
	"github.com/plimsoll-bench/plimsoll/scenarios/load"
	"github.com/plimsoll-bench/plimsoll/scenarios/meters"
)

const (
	// otherShare is how much of the machine all else may use during a visit before the visit is repeated.
	otherShare = 0.05
	// attempts is how often a round does the same work before its last result stands, with a warning.
	attempts = 4
	// repeatShare bounds the repeats at a rung, as a share of its work: on a machine that is never quiet they would triple the
	// time and cure nothing.
	repeatShare = 0.25
	// minQuiet is how many such connects a median can stand on; with fewer there is none.
	minQuiet = 50
	// closedLimit bounds the closed loop of one target, on slow modes and disturbed machines. It is longer than a connect that
	// times out in it, which is counted, and than most disturbed spells.
	closedLimit = 3 * time.Second
	// minPatience is what a request may pause at least: none would set no bound (load.Request.Patience).
	minPatience = time.Millisecond
	// burst is how many of the paced connects are due together.
	burst = 10
	// connectTimeout is when a connect counts as timed out.
	connectTimeout = time.Second
)

// work is one scenario and target of a visit.
type work struct {
	scenario connecting
	target   string
	seed     uint64 // of the Services and of the order in which they are connected to
	repeated bool   // it was done before in this round, and has had its share of waiting
}

// connects is how many connects the closed loop times, where n is the plan's number.
func (w work) connects(n int) int { return n * w.scenario.Spread(w.target) }

// work lists what every visit of a round does, in random order: none of the targets is always the one right after the thaw.
// Every site of a round draws the same numbers, so that all connect to the same random Services.
func (b *bench) work(r *rung, round int) []work {
	rng := rand.New(rand.NewPCG(b.plan.Seed, uint64(r.services)<<20|uint64(round)))
	var all []work
	for _, sc := range b.scenarios {
		for _, target := range sc.Targets() {
			all = append(all, work{scenario: sc.(connecting), target: target, seed: rng.Uint64()})
		}
	}
	rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

// visit lets one site run alone and does the work on it. What something disturbed is void when it may be done again, and
// returned as left to do; otherwise its records say what disturbed it.
func (b *bench) visit(ctx context.Context, r *rung, s *site, round int, todo []work, mayRepeat bool) (left []work, err error) {
	if err := s.thaw(ctx); err != nil {
		return nil, err
	}
	all, doubts, err := b.measure(ctx, r, s, round, todo)
	if err != nil {
		return nil, err
	}
	if err := s.freeze(ctx); err != nil {
		return nil, err
	}
	for _, m := range all {
		// Waiting again takes as much as has been saved elsewhere, or a busy hour would make a run longer without a bound.
		if mayRepeat && (len(doubts) > 0 || m.doubt != "" && b.patience >= b.plan.Patience) {
			m.work.repeated = true
			left = append(left, m.work)
			if m.doubt != "" {
				doubts = append(slices.Clip(doubts), m.work.target+": "+m.doubt)
			}
			continue
		}
		if err := b.writer.Append(m.record); err != nil {
			return nil, err
		}
		if err := b.samples.append(m); err != nil {
			return nil, err
		}
	}
	if len(left) > 0 {
		b.report.Warn(fmt.Sprintf("%s, %d Services, round %d, done again: %s", s.name, r.services, round+1, strings.Join(doubts, "; ")))
	}
	return left, nil
}

// measured is one record with the samples that it sums up.
type measured struct {
	work      work
	record    results.Record
	latencies []int64 // those that the figures are of
	disturbed []int64 // those that were made while the CPU was not at its full speed
	doubt     string  // why it should be done again; empty when nothing is wrong
}

// measure makes one attempt at the work. The doubts that it returns are about all of it.
func (b *bench) measure(ctx context.Context, r *rung, s *site, round int, todo []work) (all []measured, doubts []string, err error) {
	overflows, err := s.load.overflows(ctx)
	if err != nil {
		return nil, nil, err
	}
	before, err := s.meters().Read()
	if err != nil {
		return nil, nil, err
	}
	for _, w := range todo {
		services := w.scenario.Services(r, s, w.target, rand.New(rand.NewPCG(w.seed, 0)), load.QuietPatience*w.connects(b.plan.Connects))
		if !w.repeated {
			b.patience += b.plan.Patience
		}
		m, err := b.measureTarget(ctx, s, w.connects(b.plan.Connects), b.record(r, w.scenario.Name(), s.name, w.target, round), load.Request{
			Addresses: s.addresses(services, w.scenario.ThroughService() && s.mode.Floor() != ""),
			Seed:      w.seed, Timeout: connectTimeout,
		})
		if err != nil {
			return nil, nil, fmt.Errorf("%s %s: %w", w.scenario.Name(), w.target, err)
		}
		m.work = w
		all = append(all, m)
	}
	after, err := s.meters().Read()
	if err != nil {
		return nil, nil, err
	}
	other := after.Since(before).OtherShare()
	disturb := func(doubt string) {
		doubts = append(doubts, doubt)
		for i := range all {
			all[i].record.Warnings = append(all[i].record.Warnings, doubt)
		}
	}
	for i := range all {
		all[i].record.Values = append(all[i].record.Values, results.Value{Metric: "other-cpu", Unit: "percent", Value: other * 100})
	}
	if other > otherShare {
		disturb(fmt.Sprintf("everything else used %.0f %% of the machine", other*100))
	}
	now, err := s.load.overflows(ctx)
	if err != nil {
		return nil, nil, err
	}
	if now > overflows {
		disturb(fmt.Sprintf("%d connections found the accept queue full", now-overflows))
	}
	chain, err := b.readChain(ctx, s)
	if err != nil {
		return nil, nil, err
	}
	if !slices.Equal(chain, s.chain) {
		s.chain = chain
		for i := range all {
			all[i].record.Values = nil
			all[i].record.Warnings = append(all[i].record.Warnings, "void: the order of the chain changed")
		}
		doubts = append(doubts, "the order of the chain changed")
	}
	return all, doubts, nil
}

// meters are set to the site's own processes; all other CPU time is somebody else's.
func (s *site) meters() meters.Site {
	m := meters.Site{Client: s.Client().Cgroup(), Proxy: s.ProxyCgroup()}
	for _, p := range s.Backends() {
		m.Servers = append(m.Servers, p.Cgroup())
	}
	return m
}

// measureTarget times so many connects in a closed loop, then reads the CPU meters around connects at the plan's rate, and adds
// both to the record.
func (b *bench) measureTarget(ctx context.Context, s *site, connects int, record results.Record, request load.Request) (measured, error) {
	closed := request
	closed.Count, closed.Warmup, closed.Limit = connects, b.plan.Warmup, closedLimit
	closed.Quiet, closed.Patience = b.quiet, max(b.patience, minPatience)
	fast, err := s.load.client.Do(ctx, closed)
	if err != nil {
		return measured{}, err
	}
	b.patience -= fast.Waited
	m := measured{latencies: fast.Latencies, disturbed: fast.Disturbed}
	enough := min(minQuiet, b.plan.Connects)
	if n := len(fast.Latencies); n < enough {
		m.doubt = fmt.Sprintf("the CPU was at its full speed for %d connects only", n)
		if failed := fast.Failed(); failed > 0 {
			m.doubt += fmt.Sprintf(", and %d failed", failed)
		}
		record.Warnings = append(record.Warnings, "no latency: "+m.doubt)
	} else {
		record.Values = append(latencyValues(fast), results.Value{Metric: "quiet-limit", Unit: "ns", Value: float64(b.quiet)})
	}
	request.Seed++ // other Services than the closed loop has just warmed
	request.Count, request.Rate, request.Burst, request.Limit = b.plan.PacedConnects, b.plan.Rate, burst, time.Minute
	if err := s.load.client.Prepare(ctx, request); err != nil {
		return measured{}, err
	}
	before, err := s.meters().Read()
	if err != nil {
		return measured{}, err
	}
	if err := s.load.client.Run(ctx); err != nil {
		return measured{}, err
	}
	after, err := s.meters().Read()
	if err != nil {
		return measured{}, err
	}
	paced, err := s.load.client.Collect(ctx)
	if err != nil {
		return measured{}, err
	}
	for _, reply := range []load.Reply{fast, paced} {
		record.Count += int64(len(reply.Latencies) + len(reply.Disturbed))
		record.Errors += reply.Failed() + reply.Unsent
		record.Warnings = append(record.Warnings, failures(reply)...)
	}
	if n := int64(len(paced.Latencies)) + paced.Failed(); n > 0 {
		used := after.Since(before)
		perOperation := func(d time.Duration) float64 { return float64(d) / float64(n) }
		record.Values = append(record.Values,
			results.Value{Metric: "cpu", Unit: "ns/op", Value: perOperation(used.Path())},
			results.Value{Metric: "machine-cpu", Unit: "ns/op", Value: perOperation(used.Machine - used.Harness)})
		if s.ProxyCgroup() != "" {
			record.Values = append(record.Values, results.Value{Metric: "proxy-cpu", Unit: "ns/op", Value: perOperation(used.Proxy)})
		}
	}
	if paced.Late > int64(b.plan.PacedConnects)/10 {
		record.Warnings = append(record.Warnings, fmt.Sprintf("%d of %d paced connects began late: the rate was not kept", paced.Late, b.plan.PacedConnects))
	}
	m.record = record
	return m, nil
}

// failures says how many operations failed of what, a line each, sorted.
func failures(reply load.Reply) (lines []string) {
	for name, n := range reply.Errors {
		lines = append(lines, fmt.Sprintf("%d × %s", n, name))
	}
	slices.Sort(lines)
	return lines
}

// latencyValues are the figures of the connects that count.
func latencyValues(r load.Reply) []results.Value {
	latency := load.Summarize(r.Latencies)
	return []results.Value{
		{Metric: "p50", Unit: "ns", Value: float64(latency.P50)},
		{Metric: "p90", Unit: "ns", Value: float64(latency.P90)},
		{Metric: "p99", Unit: "ns", Value: float64(latency.P99)},
		{Metric: "max", Unit: "ns", Value: float64(latency.Max)},
		{Metric: "mean", Unit: "ns", Value: latency.Mean},
		{Metric: "quiet", Unit: "percent", Value: 100 * float64(len(r.Latencies)) / float64(len(r.Latencies)+len(r.Disturbed))},
	}
}
