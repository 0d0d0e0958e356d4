// SPDX-License-Identifier: Apache-2.0

package results

import (
	"maps"
	"math"
	"slices"
)

// Crossover is where one mode becomes dearer than another.
type Crossover struct {
	Provider, Kernel string
	Endpoints        int
	Scenario, Target string
	Metric, Unit     string
	ModeA, ModeB     string

	// Services is the number from which on A costs more than B; Low and High are its 95 % interval. All are NaN if they do not cross
	// within the ladder. Low is the smallest rung, or High +Inf, where the interval reaches the ladder's end.
	Services, Low, High float64
}

// Crossovers returns one entry for each metric that is a cost and was measured in rounds, and ordered pair of modes, twins left out, in the order of the report.
func (r *Run) Crossovers() []Crossover { return newTable(r).crossovers() }

func (t *table) crossovers() []Crossover {
	var out []Crossover
	for _, k := range t.keys {
		if !about(k.metric).cost {
			continue
		}
		for _, a := range t.modes {
			for _, b := range t.modes {
				sa, sb := t.series[k][a.Name], t.series[k][b.Name]
				if a.Name == b.Name || a.Twin != "" || b.Twin != "" || sa.rounds() < 2 || sb.rounds() < 2 {
					continue
				}
				out = append(out, t.crossover(k, a, b))
			}
		}
	}
	return out
}

func (t *table) crossover(k key, a, b Mode) Crossover {
	c := Crossover{
		Provider: k.provider, Kernel: k.kernel, Endpoints: k.endpoints, Scenario: k.scenario, Target: k.target,
		Metric: k.metric, Unit: k.unit, ModeA: a.Name, ModeB: b.Name,
		Services: math.NaN(), Low: math.NaN(), High: math.NaN(),
	}
	sa, sb := t.series[k][a.Name], t.series[k][b.Name]
	rungs := difference(sa, sb)
	pair, _, ok := t.pairFor(k, a)
	if !ok || !reallyCrosses(rungs, sa, sb, pair.noise) {
		return c
	}
	medians := make([]float64, len(rungs))
	sorted, counts := make([][]float64, len(rungs)), make([][]int, len(rungs))
	for i, r := range rungs {
		medians[i] = median(r.values)
		sorted[i] = slices.Sorted(slices.Values(r.values))
		counts[i] = make([]int, len(r.values))
	}
	c.Services = crossing(rungs, medians)
	// Rung effects come from the A/A pair, then rounds within a rung are drawn.
	noise := pair.noise.effects
	rng := source(t.env.Seed, "crossover", k.String(), a.Name, b.Name)
	draws := make([]float64, resamples)
	y := make([]float64, len(rungs))
	for n := range draws {
		for i, r := range rungs {
			y[i] = resampledMedian(rng, sorted[i], counts[i])
			if len(noise) > 0 {
				y[i] += r.scale * noise[rng.IntN(len(noise))]
			}
		}
		draws[n] = crossing(rungs, y)
	}
	slices.Sort(draws)
	tail := (1 - confidence) / 2
	// No interpolation: a draw may be infinite.
	c.Low, c.High = draws[int(tail*resamples)], draws[int((1-tail)*resamples)]
	c.Low = max(c.Low, rungs[0].services)
	return c
}

// reallyCrosses reports whether a is claimed cheaper than b at one rung and dearer at a later one.
// Two flat modes cross in the noise at every second rung; that is no crossover.
func reallyCrosses(rungs []rung, a, b *series, noise aaNoise) bool {
	cheaper := false
	for _, r := range rungs {
		n := int(r.services)
		x, y := a.values(n), b.values(n)
		if !differs(x, y, noise) {
			continue
		}
		if median(x) < median(y) {
			cheaper = true
		} else if cheaper {
			return true
		}
	}
	return false
}

// crossing returns the Services at which y, interpolated between the rungs, rises above 0 for the last time;
// -Inf if it is above 0 all the way, +Inf if it ends below.
func crossing(rungs []rung, y []float64) float64 {
	last := len(y) - 1
	if y[last] <= 0 {
		return math.Inf(1)
	}
	for i := last - 1; i >= 0; i-- {
		if y[i] <= 0 {
			x0, x1 := rungs[i].services, rungs[i+1].services
			return x0 + (x1-x0)*(-y[i])/(y[i+1]-y[i])
		}
	}
	return math.Inf(-1)
}

// drift compares the smallest rung with itself at the run's end.
type drift struct {
	key
	mode          string
	services      int
	first, again  float64 // medians
	floor         float64 // NaN if not known
	beyond, known bool
}

// distance returns how far the second visit is from the first, in noise floors, or as a share of the first where there is none.
func (d drift) distance() float64 {
	if d.known && d.floor > 0 {
		return math.Abs(d.again-d.first) / d.floor
	}
	return math.Abs(d.again/d.first - 1)
}

// drifts returns the visits of the smallest rung at the end, in the order of the report. What is measured once a rung has none: programming goes
// up the ladder, and down at the end.
func (t *table) drifts() []drift {
	var out []drift
	for _, k := range t.keys {
		if !about(k.metric).tabled {
			continue
		}
		for _, m := range t.modes {
			s := t.series[k][m.Name]
			if s.rounds() < 2 || len(s.again) == 0 || len(s.visits[s.againAt]) == 0 {
				continue
			}
			d := drift{key: k, mode: m.Name, services: s.againAt, floor: math.NaN()}
			d.first, d.again = median(s.values(d.services)), median(slices.Collect(maps.Values(s.again)))
			if pair, _, ok := t.pairFor(k, m); ok {
				d.floor, d.known = pair.noise.floor, true
				d.beyond = math.Abs(d.again-d.first) > pair.noise.floor
			}
			out = append(out, d)
		}
	}
	return out
}
