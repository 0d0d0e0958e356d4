// SPDX-License-Identifier: Apache-2.0

package results

import (
	"fmt"
	"math"
	"strings"
	"text/tabwriter"
)

// sameRatio is how far apart two runs' ratios to the floor may be where the noise floor is smaller.
const sameRatio = 0.03

// Comparison is two runs side by side.
type Comparison struct {
	Rows []ComparisonRow
	// OnlyA and OnlyB name what one run measured and the other did not.
	OnlyA, OnlyB []string
}

// ComparisonRow is one mode and metric of both runs.
type ComparisonRow struct {
	Name     string // "lab 6.18 connect/tail p50-ns ebpf"
	Main     bool   // the metric that its scenario is judged by
	A, B     Model
	Services int     // the largest rung that both runs have
	Floor    string  // the mode that the ratios are to; "" where there is none, and no ratios
	RatioA   float64 // the mode's median over Floor's at Services; NaN without
	RatioB   float64
	Limit    float64 // how far RatioB/RatioA may be from 1: the larger of both runs' relative noise floors and 3 %
}

// SameVerdict reports whether both runs have the same verdict.
func (r ComparisonRow) SameVerdict() bool { return r.A == r.B }

// SameRatio reports whether the ratios to the floor agree within Limit. Where there are none, there is nothing to disagree about.
func (r ComparisonRow) SameRatio() bool {
	if math.IsNaN(r.RatioA) && math.IsNaN(r.RatioB) {
		return true
	}
	return math.Abs(r.RatioB/r.RatioA-1) <= r.Limit
}

// Same reports whether the runs agree on every main metric, and measured the same things. A row that agrees in
// nothing but an undecided verdict still agrees. Percentiles, CPU and memory are shown and not judged.
func (c Comparison) Same() bool {
	for _, r := range c.Rows {
		if r.Main && !(r.SameVerdict() && r.SameRatio()) {
			return false
		}
	}
	return len(c.OnlyA) == 0 && len(c.OnlyB) == 0
}

// Compare holds the verdicts and the ratios to the floor of two runs against each other. It
// fails if they have nothing in common.
func Compare(a, b *Run) (Comparison, error) {
	var c Comparison
	ta, tb := newTable(a), newTable(b)
	theirs := map[string]Verdict{}
	for _, v := range tb.verdicts() {
		theirs[v.name()] = v
	}
	seen := map[string]bool{}
	for _, v := range ta.verdicts() {
		name := v.name()
		seen[name] = true
		w, ok := theirs[name]
		if !ok {
			c.OnlyA = append(c.OnlyA, name)
			continue
		}
		c.Rows = append(c.Rows, compareVerdicts(ta, tb, v, w))
	}
	for _, w := range tb.verdicts() {
		if !seen[w.name()] {
			c.OnlyB = append(c.OnlyB, w.name())
		}
	}
	if len(c.Rows) == 0 {
		return c, fmt.Errorf("compare runs %q and %q: they measured nothing in common", a.Environment.Run, b.Environment.Run)
	}
	return c, nil
}

func (v Verdict) name() string {
	return fmt.Sprintf("%s %s %s/%s endpoints=%d %s-%s %s", v.Provider, v.Kernel, v.Scenario, v.Target, v.Endpoints, v.Metric, v.Unit, v.Mode)
}

func (v Verdict) key() key {
	return key{v.Provider, v.Kernel, v.Endpoints, v.Scenario, v.Target, v.Metric, v.Unit}
}

func compareVerdicts(ta, tb *table, v, w Verdict) ComparisonRow {
	k := v.key()
	row := ComparisonRow{Name: v.name(), Main: k.metric == ta.mainMetric(k), A: v.Model, B: w.Model, RatioA: math.NaN(), RatioB: math.NaN(), Limit: sameRatio}
	sa, sb := ta.series[k][v.Mode], tb.series[k][v.Mode]
	for _, n := range sa.rungs() {
		if len(sb.values(n)) > 0 {
			row.Services = n
		}
	}
	if row.Services == 0 || v.FloorMode == "" || v.FloorMode != w.FloorMode {
		return row
	}
	row.Floor = v.FloorMode
	fa, fb := ta.floorSeries(k, v.FloorMode), tb.floorSeries(k, v.FloorMode)
	row.RatioA = ratio(sa, fa, v.FloorMode, row.Services, aaNoise{}).Value
	row.RatioB = ratio(sb, fb, v.FloorMode, row.Services, aaNoise{}).Value
	for _, relative := range []float64{v.Floor / median(fa.values(row.Services)), w.Floor / median(fb.values(row.Services))} {
		if !math.IsNaN(relative) {
			row.Limit = max(row.Limit, relative)
		}
	}
	return row
}

// String renders the comparison as a table, what disagrees marked at the end of its line.
func (c Comparison) String() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "measured\tverdict A\tverdict B\tat\tratio A\tratio B\tdifference\tlimit\t")
	for _, r := range c.Rows {
		var marks []string
		if !r.SameVerdict() {
			marks = append(marks, "verdicts differ")
		}
		if !r.SameRatio() {
			marks = append(marks, "ratios differ")
		}
		mark := strings.Join(marks, ", ")
		if mark != "" && !r.Main {
			mark = "(" + mark + ")"
		}
		a, bb, d, limit := "–", "–", "–", "–"
		if r.Floor != "" && !math.IsNaN(r.RatioA) && !math.IsNaN(r.RatioB) {
			a, bb = fmt.Sprintf("%.3f", r.RatioA), fmt.Sprintf("%.3f", r.RatioB)
			d, limit = fmt.Sprintf("%+.1f %%", 100*(r.RatioB/r.RatioA-1)), fmt.Sprintf("%.1f %%", 100*r.Limit)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Name, r.A, r.B, number(r.Services), a, bb, d, limit, mark)
	}
	w.Flush()
	for _, only := range []struct {
		run   string
		names []string
	}{{"A", c.OnlyA}, {"B", c.OnlyB}} {
		for _, n := range only.names {
			fmt.Fprintf(&b, "only in %s: %s\n", only.run, n)
		}
	}
	if c.Same() {
		b.WriteString("The runs agree.\n")
	} else {
		b.WriteString("The runs do not agree.\n")
	}
	// tabwriter pads the last column.
	lines := strings.Split(b.String(), "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return strings.Join(lines, "\n")
}
