// SPDX-License-Identifier: Apache-2.0

package results

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
)

// key names one thing that is compared between modes.
type key struct {
	provider, kernel string
	endpoints        int
	scenario, target string
	metric, unit     string
}

func (k key) String() string {
	return fmt.Sprintf("%s/%s/%d/%s/%s/%s-%s", k.provider, k.kernel, k.endpoints, k.scenario, k.target, k.metric, k.unit)
}

// place is what a report has one chapter for: where the modes ran, with how many endpoints.
type place struct {
	provider, kernel string
	endpoints        int
}

// group returns k for all targets: what one section and one picture show.
func (k key) group() key {
	k.target = ""
	return k
}

func (k key) place() place { return place{k.provider, k.kernel, k.endpoints} }

// series is one key of one mode.
type series struct {
	visits  map[int]map[int]float64 // services → round → value
	again   map[int]float64         // round → value, the smallest rung at the end
	againAt int                     // that rung
}

// rungs returns the rungs in ascending order.
func (s *series) rungs() []int {
	if s == nil {
		return nil
	}
	return slices.Sorted(maps.Keys(s.visits))
}

// values returns the values of a rung in the order of rounds.
func (s *series) values(services int) []float64 {
	if s == nil {
		return nil
	}
	return ordered(s.visits[services])
}

// rounds returns the most rounds that a rung has.
func (s *series) rounds() int {
	n := 0
	for _, r := range s.rungs() {
		n = max(n, len(s.visits[r]))
	}
	return n
}

func ordered(byRound map[int]float64) []float64 {
	var out []float64
	for _, r := range slices.Sorted(maps.Keys(byRound)) {
		out = append(out, byRound[r])
	}
	return out
}

// skip is a rung that a mode could not give.
type skip struct {
	place
	scenario, target, mode string
	services               int
	again                  bool // at the second visit of the smallest rung: what the first one gave stands
	reason                 string
}

// visit names what is measured at once; its metrics share skips and errors.
type visit struct {
	place
	scenario, target, mode string
}

// table is a run's records by key and mode.
type table struct {
	env    *Environment
	keys   []key // in the order of the report
	modes  []Mode
	series map[key]map[string]*series

	skips  []skip                     // one a visit and rung, in the order of the report, the second visits of the smallest rung last
	errors map[visit]map[int][2]int64 // services → failed, all
	rounds map[visit]map[int]int      // services → visits but the second ones of the smallest rung, with or without a value

	repeated int // values that a later record replaced
}

// newTable sorts the records in. Where a visit was repeated, the later record stands.
func newTable(r *Run) *table {
	t := &table{env: &r.Environment, series: map[key]map[string]*series{}, errors: map[visit]map[int][2]int64{}, rounds: map[visit]map[int]int{}}
	known := map[string]bool{}
	for _, m := range r.Environment.Modes {
		t.modes = append(t.modes, m)
		known[m.Name] = true
	}
	var others []Mode
	seen := map[skip]bool{}
	for _, rec := range r.Records {
		if !known[rec.Mode] {
			known[rec.Mode] = true
			others = append(others, Mode{Name: rec.Mode})
		}
		p := place{rec.Provider, rec.Kernel, rec.Endpoints}
		if rec.Skipped != "" {
			s := skip{p, rec.Scenario, rec.Target, rec.Mode, rec.Services, rec.Again, rec.Skipped}
			if !seen[s] {
				seen[s] = true
				t.skips = append(t.skips, s)
			}
			continue
		}
		v := visit{p, rec.Scenario, rec.Target, rec.Mode}
		if t.errors[v] == nil {
			t.errors[v], t.rounds[v] = map[int][2]int64{}, map[int]int{}
		}
		if !rec.Again {
			t.rounds[v][rec.Services] = max(t.rounds[v][rec.Services], rec.Round+1)
		}
		n := t.errors[v][rec.Services]
		t.errors[v][rec.Services] = [2]int64{n[0] + rec.Errors, n[1] + rec.Errors + rec.Count}
		for _, val := range rec.Values {
			t.add(key{rec.Provider, rec.Kernel, rec.Endpoints, rec.Scenario, rec.Target, val.Metric, val.Unit}, rec, val.Value)
		}
	}
	slices.SortFunc(others, func(a, b Mode) int { return cmp.Compare(a.Name, b.Name) })
	t.modes = append(t.modes, others...)
	t.keys = slices.SortedFunc(maps.Keys(t.series), t.compareKeys)
	slices.SortStableFunc(t.skips, func(a, b skip) int {
		return cmp.Or(comparePlaces(a.place, b.place), t.compareScenarios(a.scenario, b.scenario), compareListed(targets, a.target, b.target),
			cmp.Compare(t.position(a.mode), t.position(b.mode)), compareBools(a.again, b.again), cmp.Compare(a.services, b.services))
	})
	return t
}

func (t *table) add(k key, rec Record, value float64) {
	if t.series[k] == nil {
		t.series[k] = map[string]*series{}
	}
	s := t.series[k][rec.Mode]
	if s == nil {
		s = &series{visits: map[int]map[int]float64{}, again: map[int]float64{}}
		t.series[k][rec.Mode] = s
	}
	if rec.Again {
		if _, ok := s.again[rec.Round]; ok {
			t.repeated++
		}
		s.again[rec.Round], s.againAt = value, rec.Services
		return
	}
	if s.visits[rec.Services] == nil {
		s.visits[rec.Services] = map[int]float64{}
	}
	if _, ok := s.visits[rec.Services][rec.Round]; ok {
		t.repeated++
	}
	s.visits[rec.Services][rec.Round] = value
}

// compareBools puts false first.
func compareBools(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// targets are in the order in which a reader wants them. Others stand at the empty string, by name.
var targets = []string{"head", "middle", "tail", "random", "pod", "fleet", ""}

func (t *table) compareKeys(a, b key) int {
	return cmp.Or(comparePlaces(a.place(), b.place()), t.compareScenarios(a.scenario, b.scenario),
		cmp.Compare(metricIndex(a.metric), metricIndex(b.metric)), cmp.Compare(a.metric, b.metric), cmp.Compare(a.unit, b.unit),
		compareListed(targets, a.target, b.target))
}

// comparePlaces puts guests last: instructions come after times.
func comparePlaces(a, b place) int {
	const guests = "guest"
	return cmp.Or(compareBools(a.provider == guests, b.provider == guests), cmp.Compare(a.provider, b.provider), cmp.Compare(a.kernel, b.kernel), cmp.Compare(a.endpoints, b.endpoints))
}

func (t *table) compareScenarios(a, b string) int { return compareListed(t.env.Plan.Scenarios, a, b) }

func compareListed(list []string, a, b string) int {
	index := func(s string) int {
		if i := slices.Index(list, s); i >= 0 {
			return i
		}
		if i := slices.Index(list, ""); i >= 0 {
			return i
		}
		return len(list)
	}
	return cmp.Or(cmp.Compare(index(a), index(b)), cmp.Compare(a, b))
}

func (t *table) position(mode string) int {
	return slices.IndexFunc(t.modes, func(m Mode) bool { return m.Name == mode })
}

// floors returns the modes that others are held against.
func (t *table) floors() []Mode {
	var out []Mode
	for _, m := range t.modes {
		if t.isFloor(m) {
			out = append(out, m)
		}
	}
	return out
}

// isFloor reports whether the environment describes m and names no floor for it. A mode that
// it does not describe, as in a folder put together by hand, is held against nothing.
func (t *table) isFloor(m Mode) bool {
	return m.Floor == "" && m.Twin == "" && slices.ContainsFunc(t.env.Modes, func(e Mode) bool { return e.Name == m.Name })
}

// base returns what is subtracted from m at k: its floor, or the first other floor where that was not measured. It is nil if there is none.
func (t *table) base(k key, m Mode) (name string, s *series) {
	if s := t.floorSeries(k, m.Floor); s != nil {
		return m.Floor, s
	}
	for _, f := range t.floors() {
		if s := t.floorSeries(k, f.Name); s != nil {
			return f.Name, s
		}
	}
	return "", nil
}

// floorSeries returns what mode measured for k. A floor that was measured for one target only
// stands for all targets: without a Service there is no head or tail.
func (t *table) floorSeries(k key, mode string) *series {
	if s := t.series[k][mode]; s != nil {
		return s
	}
	var only *series
	for _, other := range t.keys {
		if other.group() != k.group() || t.series[other][mode] == nil {
			continue
		}
		if only != nil {
			return nil
		}
		only = t.series[other][mode]
	}
	return only
}

// difference returns a − b per rung, paired within rounds. Rounds that one of them lacks are left out, and so are rungs without a pair.
func difference(a, b *series) []rung {
	var out []rung
	for _, n := range a.rungs() {
		var d, av, bv []float64
		for _, round := range slices.Sorted(maps.Keys(a.visits[n])) {
			if b == nil {
				continue
			}
			if y, ok := b.visits[n][round]; ok {
				x := a.visits[n][round]
				d, av, bv = append(d, x-y), append(av, x), append(bv, y)
			}
		}
		if len(d) > 0 {
			out = append(out, rung{services: float64(n), values: d, scale: math.Hypot(median(av), median(bv))})
		}
	}
	return positiveScales(out)
}

// raw returns the series itself per rung.
func raw(s *series) []rung {
	var out []rung
	for _, n := range s.rungs() {
		values := s.values(n)
		out = append(out, rung{services: float64(n), values: values, scale: math.Abs(median(values))})
	}
	return positiveScales(out)
}

// positiveScales keeps a rung that measured 0, as of CPU, from having infinite weight.
func positiveScales(rungs []rung) []rung {
	var top float64
	for _, r := range rungs {
		top = max(top, r.scale)
	}
	if top == 0 {
		top = 1
	}
	for i := range rungs {
		rungs[i].scale = max(rungs[i].scale, top/1000)
	}
	return rungs
}
