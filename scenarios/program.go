// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/dataplane"
	"github.com/plimsoll-bench/plimsoll/results"
	"github.com/plimsoll-bench/plimsoll/scenarios/fleet"
	"github.com/plimsoll-bench/plimsoll/scenarios/load"
	"github.com/plimsoll-bench/plimsoll/scenarios/meters"
)

// pollPause is how often a client asks for the newest Service: often enough for a programming time, seldom enough to leave
// the CPUs to the proxies.
const pollPause = 20 * time.Millisecond

// againLimit bounds the way back to the smallest rung: that rung is visited again to see whether the machine has drifted, which
// is not worth half an hour's wait for a proxy that takes its rules down one by one.
const againLimit = 3 * time.Minute

// stillEvery is how often a person is told for which site a rung still waits.
const stillEvery = 15 * time.Second

// fleetValues say how long the fleet itself took to be written and shown, apart from any mode.
func fleetValues(t fleet.Timing) []results.Value {
	return []results.Value{
		{Metric: "fleet-written", Unit: "ns", Value: float64(t.Written)},
		{Metric: "fleet-listed", Unit: "ns", Value: float64(t.Listed)},
	}
}

// programming is the scenario name of the records that this file writes: how long each mode took to carry a rung.
const programming = "programming"

// program scales the fleet to the rung while every site is frozen, and then has the sites carry it, one after the other in
// random order, while the others stay frozen: none takes the CPUs from another, and the fleet's own writing is in nobody's
// time. It returns when all are done and at large again. A site that is not within the plan's limit is out of the run from
// here on, and says so in the results.
//
// Note: all at once, from the first write on, was tried. Five proxies on two CPUs took twice to three times as long as alone,
// and the quick ones were timed by the fleet's writing.
func (b *bench) program(ctx context.Context, r *rung) error {
	before := b.clusters[0].fleet.Len()
	for mode, reason := range b.skipped {
		if err := b.skip(r, mode, reason); err != nil {
			return err
		}
	}
	for _, s := range b.sites {
		if s.lost != "" {
			if err := b.skip(r, s.name, s.lost); err != nil {
				return err
			}
		}
	}
	if err := b.freezeAll(ctx, true); err != nil {
		return err
	}
	if err := b.quietAll(ctx, false); err != nil {
		return err
	}
	b.report.Step(fmt.Sprintf("writing Services: %d → %d", before, r.services))
	for _, c := range b.clusters {
		if err := c.scale(ctx, r.services); err != nil {
			return err
		}
		b.report.Step(fmt.Sprintf("the API server shows %d Services after %.1f s", r.services, c.timing.Listed.Seconds()))
	}
	order := rand.New(rand.NewPCG(b.plan.Seed, uint64(r.services)))
	for _, i := range order.Perm(len(b.sites)) {
		if s := b.sites[i]; s.lost == "" && s.ProxyCgroup() != "" {
			if err := b.programSite(ctx, r, s, before); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
	}
	for _, s := range b.sites {
		if s.lost == "" {
			r.sites = append(r.sites, s)
		}
	}
	return b.freezeAll(ctx, false)
}

// scale brings the cluster's fleet to n Services while its sites stand still.
func (p *population) scale(ctx context.Context, n int) error {
	if err := p.Pause(ctx, false); err != nil {
		return err
	}
	var err error
	if p.timing, err = p.fleet.Scale(ctx, n, nil); err != nil {
		return err
	}
	for i := range n {
		p.numbers[p.fleet.Service(i).Address] = i
	}
	return p.Pause(ctx, true)
}

// programSite lets one frozen site see the rung, waits until it carries it, writes its record, and freezes it again.
func (b *bench) programSite(ctx context.Context, r *rung, s *site, before int) error {
	p, err := b.awaitProgrammed(ctx, s, r)
	if err != nil {
		return err
	}
	if p.failed != "" {
		return b.lose(ctx, r, s, p.failed)
	}
	b.report.Step(fmt.Sprintf("%s carries %d Services after %.1f s", s.name, r.services, p.took.Seconds()))
	memory, err := meters.ReadMemory(s.ProxyCgroup())
	if err != nil {
		return err
	}
	rec := b.record(r, programming, s.name, "fleet", 0)
	rec.Count = int64(max(r.services-before, before-r.services))
	rec.Values = append(fleetValues(s.cluster.timing), []results.Value{
		{Metric: "programming", Unit: "ns", Value: float64(p.took)},
		{Metric: "proxy-programming-cpu", Unit: "ns", Value: float64(p.cpu)},
		{Metric: "proxy-rss", Unit: "bytes", Value: float64(memory.RSS)},
	}...)
	if err := b.writer.Append(rec); err != nil {
		return err
	}
	return s.freeze(ctx)
}

// programmed is how a site came to carry a rung, or why it did not.
type programmed struct {
	failed string
	took   time.Duration
	cpu    time.Duration
}

// lookEvery is how often a wait for a site's newest Service is broken off to see whether its proxy lives.
const lookEvery = 5 * time.Second

// awaitProgrammed lets a site go on and waits until it carries the rung: the newest Service answers and the rules or maps
// count N.
func (b *bench) awaitProgrammed(ctx context.Context, s *site, r *rung) (programmed, error) {
	var p programmed
	cpu, err := meters.Usage(s.ProxyCgroup())
	if err != nil {
		return p, err
	}
	began := time.Now()
	if err := s.thaw(ctx); err != nil {
		return p, err
	}
	patience := b.plan.ProgrammingLimit
	if r.again {
		patience = min(patience, againLimit)
	}
	limit, cancel := context.WithDeadline(ctx, began.Add(patience))
	defer cancel()
	newest := s.cluster.fleet.Service(r.services - 1).Address
	counted, want := 0, s.base+r.services
	told := began
	late := func() (programmed, error) {
		if ctx.Err() != nil {
			return p, ctx.Err()
		}
		p.failed = fmt.Sprintf("not programmed in %s (%d of %d Service ports)", patience, counted, want)
		return p, nil
	}
	for {
		if err := s.Err(); err != nil {
			p.failed = clusters.Reason(err)
			return p, nil
		}
		left := time.Until(began.Add(patience))
		if left <= 0 {
			counted, _ = s.mode.Programmed(ctx, s.Site) // best effort: it only completes the message
			return late()
		}
		reply, err := s.load.client.Do(ctx, load.Request{Kind: load.Wait, Addresses: []netip.AddrPort{newest}, Pause: pollPause, Limit: min(left, lookEvery)})
		if err != nil {
			return p, err
		}
		if now := time.Now(); now.Sub(told) >= stillEvery {
			told = now
			b.report.Step(fmt.Sprintf("still waiting for %s (%s of at most %s)", s.name, now.Sub(began).Round(time.Second), patience))
		}
		if reply.Unsent > 0 {
			continue
		}
		answered := time.Now()
		// Counting takes its time on a large rung; a proxy that is still at work gets as much between two counts.
		if counted, err = s.mode.Programmed(limit, s.Site); err != nil && limit.Err() == nil {
			return p, err
		}
		if err == nil && counted == want {
			p.took = answered.Sub(began)
			now, err := meters.Usage(s.ProxyCgroup())
			p.cpu = now - cpu
			return p, err
		}
		select {
		case <-limit.Done():
			return late()
		case <-time.After(max(50*time.Millisecond, time.Since(answered))):
		}
	}
}

// lose takes a site out of the run: its proxy ends, so that it disturbs nobody, and its rows say why.
func (b *bench) lose(ctx context.Context, r *rung, s *site, why string) error {
	s.lost = why
	b.report.Warn(fmt.Sprintf("%s: %s; it is out of the run from here on", s.name, why))
	if err := b.skip(r, s.name, why); err != nil {
		return err
	}
	limit, cancel := context.WithTimeout(ctx, restLimit)
	defer cancel()
	err := s.Stop(limit)
	if err == nil {
		err = s.freeze(limit)
	}
	if err != nil && ctx.Err() == nil {
		// The kernel may be deep in its transaction. What it uses of the CPUs shows in every visit.
		b.report.Warn(fmt.Sprintf("%s: its proxy does not end: %v", s.name, err))
	}
	return ctx.Err()
}

// skip writes one row a scenario and target that says why there is nothing to measure.
func (b *bench) skip(r *rung, mode, why string) error {
	for _, rec := range b.skips(r, mode, why) {
		if err := b.writer.Append(rec); err != nil {
			return err
		}
	}
	return nil
}

// skips are the rows of a mode at a rung that say why there is nothing to measure.
func (b *bench) skips(r *rung, mode, why string) (all []results.Record) {
	for _, sc := range b.scenarios {
		for _, target := range sc.Targets() {
			all = append(all, b.record(r, sc.Name(), mode, target, 0))
		}
	}
	all = append(all, b.record(r, programming, mode, "fleet", 0))
	for i := range all {
		all[i].Skipped = why
	}
	return all
}

// restShare and restTime say what rest is: a proxy that used less than 1 % of a CPU for two seconds and has nothing queued.
const (
	restShare = 0.01
	restTime  = 2 * time.Second
	// restLimit bounds the wait; a proxy that does not come to rest is measured all the same, with a warning.
	restLimit = 3 * time.Minute
)

// rest waits until every proxy of the rung is at rest.
func (b *bench) rest(ctx context.Context, r *rung) error {
	b.report.Step("waiting for the proxies to rest")
	limit, cancel := context.WithTimeout(ctx, restLimit)
	defer cancel()
	g, gctx := errgroup.WithContext(limit)
	for _, s := range r.sites {
		if s.ProxyCgroup() != "" {
			g.Go(func() error { return s.rest(gctx) })
		}
	}
	err := g.Wait()
	if err != nil && ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
		r.warnings = append(r.warnings, fmt.Sprintf("a proxy was not at rest after %s: %v", restLimit, err))
		b.report.Warn(fmt.Sprintf("%d Services: %s", r.services, r.warnings[len(r.warnings)-1]))
		return nil
	}
	return err
}

func (s *site) rest(ctx context.Context) error {
	window := time.NewTicker(restTime)
	defer window.Stop()
	last, err := meters.Usage(s.ProxyCgroup())
	if err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s does not rest: %w", s.name, context.Cause(ctx))
		case <-window.C:
		}
		now, err := meters.Usage(s.ProxyCgroup())
		if err != nil {
			return err
		}
		idle := float64(now-last) < restShare*float64(restTime)
		last = now
		if !idle {
			continue
		}
		if done, err := dataplane.NothingQueued(ctx, s.Site); err != nil {
			return err
		} else if done {
			return nil
		}
	}
}

// readChains reads the order of Services from the kernel of every site that has one.
func (b *bench) readChains(ctx context.Context, r *rung) error {
	for _, s := range r.sites {
		chain, err := b.readChain(ctx, s)
		if err != nil {
			return err
		}
		s.chain = chain
	}
	return nil
}

// readChain is the site's chain as numbers in the fleet.
func (b *bench) readChain(ctx context.Context, s *site) ([]int, error) {
	chain, err := s.mode.Chain(ctx, s.Site)
	if err != nil {
		return nil, err
	}
	var numbers []int
	for _, a := range chain {
		// The API server's own Service is no part of the fleet.
		if n, ok := s.cluster.numbers[a]; ok {
			numbers = append(numbers, n)
		}
	}
	return numbers, nil
}
