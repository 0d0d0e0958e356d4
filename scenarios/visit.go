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
	// attempts is how often a round makes a visit before its last result stands, with a warning.
	attempts = 3
	// repeatShare bounds all repeats of a run, as a share of its visits: on a machine that is never quiet they would triple
	// its time and cure nothing.
	repeatShare = 0.1
	// quietSlack is how much slower than its fastest the CPU may be for a connect to count (load.Request.Quiet).
	quietSlack = 0.1
	// minQuiet is how many such connects a median can stand on; with fewer, all count.
	minQuiet = 50
	// closedLimit bounds the closed loop of one target, on slow modes and disturbed machines.
	closedLimit = 800 * time.Millisecond
	// burst is how many of the paced connects are due together.
	burst = 10
	// connectTimeout is when a connect counts as timed out.
	connectTimeout = time.Second
)

// visit lets one site run alone and measures every scenario and target on it. A visit that something disturbed is void when
// it may be made again, which again then asks for; otherwise its records say what disturbed it.
func (b *bench) visit(ctx context.Context, r *rung, s *site, round int, mayRepeat bool) (again bool, err error) {
	if err := s.Freeze(ctx, false); err != nil {
		return false, err
	}
	records, doubts, err := b.measure(ctx, r, s, round)
	if err != nil {
		return false, err
	}
	if err := s.Freeze(ctx, true); err != nil {
		return false, err
	}
	if len(doubts) > 0 && mayRepeat {
		b.report.Warn(fmt.Sprintf("%s, %d Services, round %d: %s; the visit is repeated", s.name, r.services, round+1, strings.Join(doubts, "; ")))
		return true, nil
	}
	for _, m := range records {
		m.record.Warnings = append(m.record.Warnings, doubts...)
		if err := b.writer.Append(m.record); err != nil {
			return false, err
		}
		if err := b.samples.append(m); err != nil {
			return false, err
		}
	}
	return false, nil
}

// measured is one record with the samples that it sums up.
type measured struct {
	record    results.Record
	latencies []int64 // those that the figures are of
	disturbed []int64 // those that were made while the CPU was not at its full speed
	doubt     string  // why the visit should not count; empty when nothing is wrong
}

// measure makes one attempt at a visit. The doubts that it returns say why it should not count.
func (b *bench) measure(ctx context.Context, r *rung, s *site, round int) (records []measured, doubts []string, err error) {
	// Every site of a round draws the same numbers, so that all connect to the same random Services.
	rng := rand.New(rand.NewPCG(b.plan.Seed, uint64(r.services)<<20|uint64(round)))
	overflows, err := s.load.overflows(ctx)
	if err != nil {
		return nil, nil, err
	}
	before, err := s.meters().Read()
	if err != nil {
		return nil, nil, err
	}
	for _, sc := range b.scenarios {
		for _, target := range sc.Targets() {
			services := sc.Services(r, s, target, rng, b.plan.Connects)
			m, err := b.measureTarget(ctx, s, b.record(r, sc.Name(), s.name, target, round), load.Request{
				Addresses: addresses(b.fleet, services, sc.ThroughService() && s.mode.Floor() != ""),
				Seed:      rng.Uint64(), Timeout: connectTimeout,
			})
			if err != nil {
				return nil, nil, fmt.Errorf("%s %s: %w", sc.Name(), target, err)
			}
			records = append(records, m)
			if m.doubt != "" {
				doubts = append(doubts, m.doubt)
			}
		}
	}
	after, err := s.meters().Read()
	if err != nil {
		return nil, nil, err
	}
	other := after.Since(before).OtherShare()
	for i := range records {
		records[i].record.Values = append(records[i].record.Values, results.Value{Metric: "other-cpu", Unit: "percent", Value: other * 100})
	}
	if other > otherShare {
		doubts = append(doubts, fmt.Sprintf("everything else used %.0f %% of the machine", other*100))
	}
	now, err := s.load.overflows(ctx)
	if err != nil {
		return nil, nil, err
	}
	if now > overflows {
		doubts = append(doubts, fmt.Sprintf("%d connections found the accept queue full", now-overflows))
	}
	chain, err := b.readChain(ctx, s)
	if err != nil {
		return nil, nil, err
	}
	if !slices.Equal(chain, s.chain) {
		doubts = append(doubts, "the order of the chain changed")
		s.chain = chain
	}
	return records, doubts, nil
}

// meters are set to the site's own processes; all other CPU time is somebody else's.
func (s *site) meters() meters.Site {
	m := meters.Site{Client: s.Client().Cgroup(), Proxy: s.ProxyCgroup()}
	for _, p := range s.Backends() {
		m.Servers = append(m.Servers, p.Cgroup())
	}
	return m
}

// measureTarget times connects in a closed loop, then reads the CPU meters around connects at the plan's rate, and adds
// both to the record.
func (b *bench) measureTarget(ctx context.Context, s *site, record results.Record, request load.Request) (measured, error) {
	closed := request
	closed.Count, closed.Warmup, closed.Limit = b.plan.Connects, b.plan.Warmup, closedLimit
	closed.Quiet, closed.Reference = quietSlack, b.reference
	fast, err := s.load.client.Do(ctx, closed)
	if err != nil {
		return measured{}, err
	}
	b.reference = fast.Reference
	latencies, doubt := fast.Latencies, ""
	if len(latencies) < minQuiet {
		doubt = fmt.Sprintf("%s: the CPU was at its full speed during %d of %d connects only, and all of them count", record.Target, len(latencies), len(latencies)+len(fast.Disturbed))
		latencies = append(latencies, fast.Disturbed...)
	}
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
	if len(latencies) == 0 || len(paced.Latencies) == 0 {
		return measured{}, fmt.Errorf("no connect succeeded: %v %v", fast.Errors, paced.Errors)
	}
	for _, reply := range []load.Reply{fast, paced} {
		record.Count += int64(len(reply.Latencies) + len(reply.Disturbed))
		record.Errors += reply.Failed() + reply.Unsent
		for name, n := range reply.Errors {
			record.Warnings = append(record.Warnings, fmt.Sprintf("%d × %s", n, name))
		}
	}
	latency := load.Summarize(latencies)
	used := after.Since(before)
	perOperation := func(d time.Duration) float64 { return float64(d) / float64(int64(len(paced.Latencies))+paced.Failed()) }
	record.Values = []results.Value{
		{Metric: "p50", Unit: "ns", Value: float64(latency.P50)},
		{Metric: "p90", Unit: "ns", Value: float64(latency.P90)},
		{Metric: "p99", Unit: "ns", Value: float64(latency.P99)},
		{Metric: "max", Unit: "ns", Value: float64(latency.Max)},
		{Metric: "mean", Unit: "ns", Value: latency.Mean},
		{Metric: "quiet", Unit: "percent", Value: 100 * float64(len(fast.Latencies)) / float64(len(fast.Latencies)+len(fast.Disturbed))},
		{Metric: "cpu", Unit: "ns/op", Value: perOperation(used.Path())},
		{Metric: "machine-cpu", Unit: "ns/op", Value: perOperation(used.Machine)},
	}
	if s.ProxyCgroup() != "" {
		record.Values = append(record.Values, results.Value{Metric: "proxy-cpu", Unit: "ns/op", Value: perOperation(used.Proxy)})
	}
	return measured{record: record, latencies: latencies, disturbed: fast.Disturbed, doubt: doubt}, nil
}
