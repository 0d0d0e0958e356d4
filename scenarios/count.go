// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/dataplane"
	"github.com/plimsoll-bench/plimsoll/results"
)

// Guests boots guests that do jobs.
type Guests interface {
	// Run has a guest with a seed do a cell's work, and returns what it wrote. dir is a folder of its own. Errors wrap clusters.ErrLate where the
	// work was not done in time, and clusters.ErrNotSupported where there are no guests here.
	Run(ctx context.Context, dir string, seed uint64, cell []byte) ([]byte, error)
}

// Count carries a plan out in guests of a provider, each of which does one cell, so many side by side. It leaves what Run leaves, in
// the same folder if there is something already; the records are the same to the byte for the same plan, programs and kernel. env has the guests' kernel.
func Count(ctx context.Context, plan Plan, provider clusters.Provider, guests Guests, side int, env results.Environment, report Reporter) (err error) {
	c := &sweep{guests: guests, bench: &bench{plan: plan, provider: provider, report: report, kernel: kernelVersion(env.Kernel)}}
	if c.bench.scenarios, err = findAll(plan.Scenarios); err != nil {
		return err
	}
	for _, name := range plan.Modes {
		m, err := dataplane.Find(name)
		if err != nil {
			return err
		}
		described := results.Mode{Name: m.Name(), Doc: m.Doc(), Floor: m.Floor()}
		env.Modes = append(env.Modes, described)
		if name == plan.Twin {
			described.Name += TwinSuffix
			described.Doc, described.Twin = m.Name()+" with other seeds; the difference between the two is noise", m.Name()
			env.Modes = append(env.Modes, described)
		}
	}
	env.Plan = results.Plan{Scenarios: plan.Scenarios, Services: plan.Services, Endpoints: plan.Endpoints, Rounds: plan.Rounds}
	writer, err := results.Create(plan.Out, env)
	if errors.Is(err, results.ErrHoldsRun) {
		writer, env, err = results.Extend(plan.Out, env)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, writer.Close()) }()
	if c.bench.samples, err = createSamples(plan.Out, CountsFile); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.bench.samples.close()) }()
	if err := c.run(ctx, side, writer); err != nil {
		return err
	}
	env.End = time.Now()
	return writer.Finish(env)
}

// A sweep is a Count at work.
type sweep struct {
	bench  *bench
	guests Guests
}

// twinSeed is what a twin's seeds are apart from its mode's.
const twinSeed = 1 << 20

// cells are all, in the order of their records.
func (c *sweep) cells() (all []Cell) {
	for _, services := range c.bench.plan.Services {
		for round := range c.bench.plan.Rounds {
			for _, mode := range c.bench.plan.Modes {
				cell := Cell{
					Mode: mode, Name: mode, Scenarios: c.bench.plan.Scenarios, Services: services, Endpoints: c.bench.plan.Endpoints, Round: round,
					Seed: c.bench.plan.Seed + uint64(round), Connects: c.bench.plan.Connects, Settings: c.bench.plan.Settings,
				}
				all = append(all, cell)
				if mode == c.bench.plan.Twin {
					cell.Name, cell.Seed = mode+TwinSuffix, cell.Seed+twinSeed
					all = append(all, cell)
				}
			}
		}
	}
	return all
}

// run does the cells side by side and writes their records in the cells' order, each as soon as those before are there.
func (c *sweep) run(ctx context.Context, side int, writer *results.Writer) error {
	cells := c.cells()
	done := make([]chan []line, len(cells))
	for i := range done {
		done[i] = make(chan []line, 1)
	}
	group, ctx := errgroup.WithContext(ctx)
	next := make(chan int)
	group.Go(func() error {
		defer close(next)
		for i := range cells {
			select {
			case next <- i:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	for range side {
		group.Go(func() error {
			for i := range next {
				lines, err := c.do(ctx, cells[i])
				if err != nil {
					return err
				}
				done[i] <- lines
			}
			return nil
		})
	}
	group.Go(func() error {
		for i, cell := range cells {
			c.bench.report.Progress(i, len(cells), fmt.Sprintf("%d Services, %s", cell.Services, cell.Mode))
			select {
			case lines := <-done[i]:
				for _, l := range lines {
					if err := errors.Join(writer.Append(l.Record), c.bench.samples.appendCounts(l)); err != nil {
						return err
					}
				}
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	})
	return group.Wait()
}

// do has a guest do a cell. One that is late gives rows that say so.
func (c *sweep) do(ctx context.Context, cell Cell) (lines []line, err error) {
	job, err := json.Marshal(cell)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("%s-%d-%d", cell.Name, cell.Services, cell.Round)
	began := time.Now()
	text, err := c.guests.Run(ctx, filepath.Join(c.bench.plan.Out, "logs", name), cell.Seed, job)
	if errors.Is(err, clusters.ErrNotSupported) {
		return c.skips(cell, clusters.Reason(err)), nil
	}
	if errors.Is(err, clusters.ErrLate) {
		c.bench.report.Warn(fmt.Sprintf("%s: %v", name, err))
		why, _, _ := strings.Cut(err.Error(), "\n")
		return c.skips(cell, why), nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	c.bench.report.Step(fmt.Sprintf("%s: done in %.0f s", name, time.Since(began).Seconds()))
	d := json.NewDecoder(bytes.NewReader(text))
	for d.More() {
		var l line
		if err := d.Decode(&l); err != nil {
			return nil, fmt.Errorf("%s: records: %w", name, err)
		}
		lines = append(lines, l)
	}
	return lines, nil
}

// skips are a cell's lines where there is nothing to count.
func (c *sweep) skips(cell Cell, why string) (lines []line) {
	for _, r := range c.bench.skips(&rung{services: cell.Services}, cell.Name, why) {
		lines = append(lines, line{Record: r})
	}
	return lines
}
