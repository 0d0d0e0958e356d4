// SPDX-License-Identifier: Apache-2.0

package results

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// Verdict says how one metric of one mode grows with the number of Services.
type Verdict struct {
	Provider, Kernel string
	Endpoints        int
	Scenario, Target string
	Metric, Unit     string
	Mode             string

	Model Model
	// Grows says that the whole interval of Slope is above zero and Rise above Floor. With fewer rungs than a
	// growth law needs, this is all that can be said of a cost that grows.
	Grows bool
	// Slope is the growth per Service, in Unit, of a straight line through
	// cost minus FloorMode's cost; Low and High are its 95 % interval. NaN where there is none.
	Slope, Low, High float64
	// Rise is the growth from the smallest rung to the largest, in Unit, by the law that fits better.
	Rise float64
	// Bound is the largest |Rise|, in Unit, that the 95 % intervals do not exclude.
	Bound float64
	// Floor is the noise floor in Unit: 95 % of A/A differences are smaller. NaN without an A/A pair.
	Floor float64
	// FloorMode is the mode whose cost was subtracted; "" if nothing was.
	FloorMode string
	// Points is the number of rungs that the fit stands on.
	Points int
	// Note says what was subtracted, why there is no verdict, and what was skipped.
	Note    string
	remarks []string // of Note, what a table has no column for

	Smallest, Largest     int     // the first and the last rung of this mode; 0 without any
	AtSmallest, AtLargest float64 // the raw medians there, in Unit
	Ratios                []Ratio // to each floor mode, at Largest
}

// Ratio is a mode's median over a floor mode's at the same rung, the median of the rounds' ratios.
type Ratio struct {
	Floor   string
	Value   float64 // NaN where the floor mode has no such value
	Differs bool    // Mann–Whitney p < 0.05 and further apart than the noise explains
}

// NoiseFloor is what an A/A pair says about one metric.
type NoiseFloor struct {
	Provider, Kernel string
	Endpoints        int
	Scenario, Target string
	Metric, Unit     string
	Mode, Twin       string
	Floor            float64 // 95th percentile of |difference| in the same rounds, in Unit
	Relative         float64 // Floor over Mode's median
	Rounds           int     // pairs that it stands on
	Differs          bool    // a difference would be claimed at some rung: there is none, so this is a false alarm
}

// aaPair is an A/A pair at one key.
type aaPair struct {
	mode, twin string
	rungs      []rung
	noise      aaNoise
}

// pairs returns the A/A pairs that were measured at k.
func (t *table) pairs(k key) []aaPair {
	var out []aaPair
	for _, m := range t.modes {
		if m.Twin == "" {
			continue
		}
		a, b := t.series[k][m.Name], t.series[k][m.Twin]
		if a == nil || b == nil {
			continue
		}
		if d := difference(a, b); len(d) > 0 {
			out = append(out, aaPair{mode: m.Twin, twin: m.Name, rungs: d, noise: noiseOf(d)})
		}
	}
	return out
}

// pairFor returns the A/A pair that says how noisy mode is at k: its own, else its floor's, else any at k, else the noisiest of another
// target of the same scenario and metric. elsewhere names that target.
func (t *table) pairFor(k key, m Mode) (pair aaPair, elsewhere string, ok bool) {
	pairs := t.pairs(k)
	for _, name := range []string{m.Name, m.Floor} {
		for _, p := range pairs {
			if p.mode == name {
				return p, "", true
			}
		}
	}
	if len(pairs) > 0 {
		return pairs[0], "", true
	}
	for _, other := range t.keys {
		if other.group() != k.group() {
			continue
		}
		for _, p := range t.pairs(other) {
			if !ok || p.noise.floor > pair.noise.floor {
				pair, elsewhere, ok = p, other.target, true
			}
		}
	}
	return pair, elsewhere, ok
}

// Verdicts returns one verdict for each metric that is a cost and each mode but twins, in the order of the report.
// A mode that was skipped everywhere has one too, undecided, with the reason.
func (r *Run) Verdicts() []Verdict { return newTable(r).verdicts() }

func (t *table) verdicts() []Verdict {
	var out []Verdict
	for _, k := range t.keys {
		if !about(k.metric).cost {
			continue
		}
		for _, m := range t.modes {
			if m.Twin != "" {
				continue
			}
			if v, ok := t.verdict(k, m); ok {
				out = append(out, v)
			}
		}
	}
	return out
}

// verdict judges mode m at k. ok is false if the mode has nothing to do with k.
func (t *table) verdict(k key, m Mode) (v Verdict, ok bool) {
	v = Verdict{
		Provider: k.provider, Kernel: k.kernel, Endpoints: k.endpoints, Scenario: k.scenario, Target: k.target,
		Metric: k.metric, Unit: k.unit, Mode: m.Name, Model: Undecided,
		Slope: math.NaN(), Low: math.NaN(), High: math.NaN(), Rise: math.NaN(), Bound: math.NaN(), Floor: math.NaN(),
		AtSmallest: math.NaN(), AtLargest: math.NaN(),
	}
	skipped := t.skipNotes(k, m.Name)
	s := t.series[k][m.Name]
	if s.rounds() == 0 {
		if len(skipped) == 0 && k.metric == t.mainMetric(k) && len(t.rounds[visit{k.place(), k.scenario, k.target, m.Name}]) > 0 {
			skipped = []string{noValue}
		}
		v.Note = strings.Join(skipped, "; ")
		return v, len(skipped) > 0
	}
	var notes []string
	remark := func(text string) { notes, v.remarks = append(notes, text), append(v.remarks, text) }
	rungs, base := raw(s), (*series)(nil)
	switch {
	case t.isFloor(m):
		notes = append(notes, "floor: its own value, drift between rungs included")
	case m.Floor == "":
		notes = append(notes, "its own value: it has no floor mode")
	default:
		v.FloorMode, base = t.base(k, m)
		switch v.FloorMode {
		case "":
			notes = append(notes, "its own value: no floor mode has one")
		case m.Floor:
			notes = append(notes, "minus "+m.Floor)
		default:
			remark(fmt.Sprintf("minus %s: %s was not measured", v.FloorMode, m.Floor))
		}
		if base != nil {
			rungs = difference(s, base)
		}
	}
	pair, elsewhere, havePair := t.pairFor(k, m)
	noise := pair.noise
	if havePair {
		v.Floor = noise.floor
		if base == nil {
			// The drift of the machine is in the value itself and not in the pair's difference.
			noise.effects = nil
		}
		if elsewhere != "" {
			remark("noise floor of target " + elsewhere)
		}
	}
	f := fit(rungs, noise, source(t.env.Seed, "verdict", k.String(), m.Name))
	v.Model, v.Grows = f.model, f.grows(v.Floor)
	v.Slope, v.Low, v.High, v.Rise, v.Bound, v.Points = f.slope, f.low, f.high, f.rise, f.bound, len(rungs)
	if f.note != "" {
		remark(f.note)
	}
	v.Note = strings.Join(append(notes, skipped...), "; ")

	all := s.rungs()
	v.Smallest, v.Largest = all[0], all[len(all)-1]
	v.AtSmallest, v.AtLargest = median(s.values(v.Smallest)), median(s.values(v.Largest))
	for _, floor := range t.floors() {
		if floor.Name == m.Name {
			continue
		}
		v.Ratios = append(v.Ratios, ratio(s, t.floorSeries(k, floor.Name), floor.Name, v.Largest, pair.noise))
	}
	return v, true
}

// ratio pairs within rounds; noise common to a round cancels.
func ratio(s, base *series, floor string, services int, noise aaNoise) Ratio {
	r := Ratio{Floor: floor, Value: math.NaN()}
	if base == nil {
		return r
	}
	var quotients, a, b []float64
	for round, y := range base.visits[services] {
		if x, ok := s.visits[services][round]; ok && y != 0 {
			quotients, a, b = append(quotients, x/y), append(a, x), append(b, y)
		}
	}
	if len(quotients) > 0 {
		r.Value, r.Differs = median(quotients), differs(a, b, noise)
	}
	return r
}

// skippedAt returns the rungs that mode was skipped at for k, ascending, and the reason at each. The smallest rung's second
// visit is none of them: a mode that was lost on the way up was measured there all the same.
func (t *table) skippedAt(k key, mode string) (rungs []int, reasons map[int]string) {
	reasons = map[int]string{}
	for _, s := range t.skips {
		if s.place == k.place() && s.scenario == k.scenario && s.target == k.target && s.mode == mode && !s.again && reasons[s.services] == "" {
			rungs, reasons[s.services] = append(rungs, s.services), s.reason
		}
	}
	return rungs, reasons
}

// skipNotes returns "skipped at 10000 Services: reason" for each reason that mode was skipped for at k, on the way up.
func (t *table) skipNotes(k key, mode string) []string {
	var reasons []string
	rungs := map[string][]string{}
	for _, s := range t.skips {
		if s.place == k.place() && s.scenario == k.scenario && s.target == k.target && s.mode == mode && !s.again {
			if rungs[s.reason] == nil {
				reasons = append(reasons, s.reason)
			}
			if n := fmt.Sprint(s.services); !slices.Contains(rungs[s.reason], n) {
				rungs[s.reason] = append(rungs[s.reason], n)
			}
		}
	}
	for i, reason := range reasons {
		reasons[i] = fmt.Sprintf("skipped at %s Services: %s", strings.Join(rungs[reason], ", "), reason)
	}
	return reasons
}

// NoiseFloors returns what the A/A pairs of the run say, in the order of the report.
func (r *Run) NoiseFloors() []NoiseFloor { return newTable(r).noiseFloors() }

func (t *table) noiseFloors() []NoiseFloor {
	var out []NoiseFloor
	for _, k := range t.keys {
		for _, p := range t.pairs(k) {
			a, b := t.series[k][p.mode], t.series[k][p.twin]
			f := NoiseFloor{
				Provider: k.provider, Kernel: k.kernel, Endpoints: k.endpoints, Scenario: k.scenario, Target: k.target,
				Metric: k.metric, Unit: k.unit, Mode: p.mode, Twin: p.twin, Floor: p.noise.floor,
			}
			var all []float64
			for _, r := range p.rungs {
				f.Rounds += len(r.values)
				n := int(r.services)
				all = append(all, a.values(n)...)
				f.Differs = f.Differs || differs(a.values(n), b.values(n), p.noise)
			}
			f.Relative = p.noise.floor / median(all)
			out = append(out, f)
		}
	}
	return out
}
