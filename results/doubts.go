// SPDX-License-Identifier: Apache-2.0

package results

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// The sections of the report that say how far its figures can be trusted.

func (a *analysis) floorSection(b *strings.Builder, p place) {
	b.WriteString("## Noise floor\n\n")
	var rows [][]string
	for _, f := range a.floors {
		if (place{f.Provider, f.Kernel, f.Endpoints}) != p || !about(f.Metric).tabled {
			continue
		}
		verdict := "no difference claimed"
		if f.Differs {
			verdict = "a difference would be claimed at some rung: a false alarm"
		}
		rows = append(rows, []string{f.Scenario, f.Target, f.Metric, f.Mode + " and " + f.Twin, quantity(f.Floor, f.Unit), percent(f.Relative), fmt.Sprint(f.Rounds), verdict})
	}
	if len(rows) == 0 {
		b.WriteString("The run has no A/A pair, so the noise is not known and every verdict is undecided.\n\n")
		return
	}
	b.WriteString("Two nodes of one mode, measured in the same rounds: 95 % of their differences are smaller than the floor.\n\n")
	markdown(b, []string{"scenario", "target", "metric", "pair", "floor", "relative", "pairs", "A/A"}, rows)
}

// reading is one value and where it was read.
type reading struct {
	value float64
	where string
}

// readings returns all values of a metric at one place, twins and the smallest rung's second visit included, in the order of the report.
func (a *analysis) readings(p place, metric, mode string) []reading {
	var out []reading
	for _, k := range a.keys {
		if k.place() != p || k.metric != metric {
			continue
		}
		for _, m := range a.modes {
			s := a.series[k][m.Name]
			if s == nil || mode != "" && mode != m.Name {
				continue
			}
			at := func(n int, byRound map[int]float64, again string) {
				for _, round := range slices.Sorted(maps.Keys(byRound)) {
					out = append(out, reading{byRound[round], fmt.Sprintf("%s, %s %s at %s Services, round %d%s", m.Name, k.scenario, k.target, number(n), round, again)})
				}
			}
			for _, n := range s.rungs() {
				at(n, s.visits[n], "")
			}
			at(s.againAt, s.again, " (again)")
		}
	}
	return out
}

// typical returns the median of readings, the least and the greatest.
func typical(readings []reading) (middle float64, least, most reading) {
	values := make([]float64, len(readings))
	for i, r := range readings {
		values[i] = r.value
		if i == 0 || r.value < least.value {
			least = r
		}
		if i == 0 || r.value > most.value {
			most = r
		}
	}
	return median(values), least, most
}

// quietSection says how quiet the machine was, and whether the CPU meters agree.
func (a *analysis) quietSection(b *strings.Builder, p place) {
	var lines []string
	if quiet := a.readings(p, "quiet", ""); len(quiet) > 0 {
		middle, least, _ := typical(quiet)
		lines = append(lines, fmt.Sprintf("The CPU ran at its full speed during %s of the connects (median of the visits; the least is %s: %s). Only these are in the times.",
			quantity(middle, "percent"), quantity(least.value, "percent"), least.where))
	}
	if other := a.readings(p, "other-cpu", ""); len(other) > 0 {
		middle, _, most := typical(other)
		lines = append(lines, fmt.Sprintf("All but the visited node and plimsoll used %s of the machine (median of the visits; the most is %s: %s).", quantity(middle, "percent"), quantity(most.value, "percent"), most.where))
	}
	if path, machine := a.readings(p, "cpu", ""), a.readings(p, "machine-cpu", ""); len(path) > 0 && len(path) == len(machine) {
		var shares []reading
		for i, r := range path {
			if machine[i].value > 0 {
				shares = append(shares, reading{100 * r.value / machine[i].value, r.where})
			}
		}
		if len(shares) > 0 {
			middle, _, _ := typical(shares)
			lines = append(lines, fmt.Sprintf("Cross-check: CPU of client, server, kernel threads and softirq is %s of what the machine used at the same time (the median), read apart as wall clock × CPUs − idle.", quantity(middle, "percent")))
		}
	}
	var proxies []string
	for _, m := range a.modes {
		if r := a.readings(p, "proxy-cpu", m.Name); len(r) > 0 {
			middle, _, most := typical(r)
			proxies = append(proxies, fmt.Sprintf("%s %s (at most %s)", m.Name, quantity(middle, "ns/op"), quantity(most.value, "ns/op")))
		}
	}
	if len(proxies) > 0 {
		lines = append(lines, fmt.Sprintf("CPU of the proxies while connections were made, median of the visits: %s.", strings.Join(proxies, ", ")))
	}
	if len(lines) == 0 {
		return
	}
	b.WriteString("## How quiet the machine was\n\n")
	for _, l := range lines {
		fmt.Fprintf(b, "- %s\n", l)
	}
	b.WriteString("\n")
}

// driftSection compares the smallest rung with itself at the end: one line for each metric that drifted, with its worst case.
func (a *analysis) driftSection(b *strings.Builder, p place) {
	var warned, calm []string
	for _, group := range a.groups() {
		var all, beyond []drift
		for _, d := range a.drifts {
			if d.key.group() != group[0].group() || group[0].place() != p {
				continue
			}
			all = append(all, d)
			if d.beyond {
				beyond = append(beyond, d)
			}
		}
		if len(all) == 0 {
			continue
		}
		what := all[0].scenario + " " + all[0].metric
		far := all
		if len(beyond) > 0 {
			far = beyond
		}
		worst := slices.MaxFunc(far, func(x, y drift) int {
			if x.distance() < y.distance() {
				return -1
			}
			return 1
		})
		example := fmt.Sprintf("%s %s, %s at first and %s at the end", worst.mode, worst.target, quantity(worst.first, worst.unit), quantity(worst.again, worst.unit))
		switch {
		case len(beyond) > 0:
			warned = append(warned, fmt.Sprintf("**Warning:** %s: %d of %d medians came back further from their first value than the noise floor; the furthest is %s (floor %s).",
				what, len(beyond), len(all), example, quantity(worst.floor, worst.unit)))
		case !worst.known:
			warned = append(warned, fmt.Sprintf("%s: the noise floor is not known; the furthest is %s.", what, example))
		default:
			calm = append(calm, fmt.Sprintf("%s (%d)", what, len(all)))
		}
	}
	lost := a.lost(p)
	if len(warned)+len(calm)+len(lost) == 0 {
		return
	}
	b.WriteString("## The smallest rung again\n\nVisited once more after the largest, it tells whether the machine drifted. These visits are in no fit.\n\n")
	for _, l := range warned {
		fmt.Fprintf(b, "- %s\n", l)
	}
	if len(calm) > 0 {
		fmt.Fprintf(b, "- All medians of %s came back within the noise floor.\n", enumerated(calm))
	}
	for _, l := range lost {
		fmt.Fprintf(b, "- %s\n", l)
	}
	b.WriteString("\n")
}

// lost says which modes carried the smallest rung at first and were gone at the end, and why.
func (a *analysis) lost(p place) []string {
	var out []string
	for _, s := range a.skips {
		skippedBefore := slices.ContainsFunc(a.skips, func(o skip) bool {
			o.again, o.reason = !o.again, s.reason
			return o == s
		})
		if s.place != p || !s.again || skippedBefore {
			continue
		}
		if l := fmt.Sprintf("%s was not visited again: %s.", s.mode, cell(s.reason)); !slices.Contains(out, l) {
			out = append(out, l)
		}
	}
	return out
}

func (a *analysis) errorSection(b *strings.Builder) {
	b.WriteString("## Errors and time-outs\n\n")
	var failed, total int64
	var rows [][]string
	visits := slices.SortedFunc(maps.Keys(a.errors), func(x, y visit) int { return strings.Compare(fmt.Sprint(x), fmt.Sprint(y)) })
	for _, v := range visits {
		for _, n := range slices.Sorted(maps.Keys(a.errors[v])) {
			e := a.errors[v][n]
			failed, total = failed+e[0], total+e[1]
			if e[0] > 0 {
				rows = append(rows, []string{v.provider, v.scenario, v.mode, v.target, number(n), number(int(e[0])), number(int(e[1]))})
			}
		}
	}
	if failed == 0 {
		fmt.Fprintf(b, "None in %s.\n\n", plural(int(total), "operation"))
		return
	}
	fmt.Fprintf(b, "%s in %s.\n\n", plural(int(failed), "error"), plural(int(total), "operation"))
	markdown(b, []string{"provider", "scenario", "mode", "target", "Services", "errors", "of operations"}, rows)
}

var numerals = regexp.MustCompile(`[0-9]+(\.[0-9]+)?`)

// warningKind is warnings that differ in their figures alone.
type warningKind struct {
	parts   []string            // of the text, between the figures
	figures [][]string          // of each warning
	records map[string]struct{} // that carry it
	visits  map[string]struct{} // of those records
	first   string              // record
}

// warningSection prints each kind of warning once: how often, and where first.
func (a *analysis) warningSection(b *strings.Builder) {
	b.WriteString("## Warnings\n\n")
	kinds, order := map[string]*warningKind{}, []string{}
	visits, records := map[string]struct{}{}, 0
	for _, r := range a.run.Records {
		visit := fmt.Sprintf("%s at %s, round %d", r.Mode, number(r.Services), r.Round)
		if r.Again {
			visit += " (again)"
		}
		if r.Skipped == "" {
			visits[visit] = struct{}{}
			records++
		}
		record := fmt.Sprintf("%s %s on %s", r.Scenario, r.Target, visit)
		for _, w := range r.Warnings {
			parts := numerals.Split(w, -1)
			kind := strings.Join(parts, "#")
			if kinds[kind] == nil {
				order = append(order, kind)
				kinds[kind] = &warningKind{parts: parts, records: map[string]struct{}{}, visits: map[string]struct{}{}, first: record}
			}
			kinds[kind].records[record], kinds[kind].visits[visit] = struct{}{}, struct{}{}
			kinds[kind].figures = append(kinds[kind].figures, numerals.FindAllString(w, -1))
		}
	}
	if len(order) == 0 {
		b.WriteString("None.\n\n")
		return
	}
	var rows [][]string
	for _, kind := range order {
		w := kinds[kind]
		rows = append(rows, []string{w.text(), number(len(w.visits)), number(len(w.records)), w.first})
	}
	markdown(b, []string{"what", "visits", "records", "first"}, rows)
	fmt.Fprintf(b, "The run has %s and %s; a visit has a record for each target. %s has every warning.\n\n", plural(len(visits), "visit"), plural(records, "record"), ResultsFile)
}

// text returns the warning with each figure's range.
func (w *warningKind) text() string {
	var b strings.Builder
	for i, part := range w.parts {
		b.WriteString(part)
		if i == len(w.parts)-1 {
			break
		}
		least, most := w.figures[0][i], w.figures[0][i]
		for _, f := range w.figures {
			if value(f[i]) < value(least) {
				least = f[i]
			}
			if value(f[i]) > value(most) {
				most = f[i]
			}
		}
		b.WriteString(least)
		if value(most) > value(least) {
			b.WriteString(" to " + most)
		}
	}
	return b.String()
}

// value returns the number that a match of numerals is.
func value(figure string) float64 {
	x, _ := strconv.ParseFloat(figure, 64) // too many digits give +Inf, which sorts right
	return x
}

func (a *analysis) skipSection(b *strings.Builder) {
	b.WriteString("## Skipped\n\n")
	if len(a.skips) == 0 {
		b.WriteString("Nothing.\n\n")
		return
	}
	// One row for all that was skipped of a mode at the same rungs for one reason.
	type row struct {
		place
		mode, services, reason string
	}
	what := map[row][]string{}
	var order []row
	for i := 0; i < len(a.skips); {
		s := a.skips[i]
		j := i
		var rungs []string
		for ; j < len(a.skips) && a.skips[j].sameVisits(s); j++ {
			rung := number(a.skips[j].services)
			if a.skips[j].again {
				rung += " again"
			}
			rungs = append(rungs, rung)
		}
		i = j
		r := row{s.place, s.mode, strings.Join(rungs, "; "), s.reason}
		if what[r] == nil {
			order = append(order, r)
		}
		what[r] = append(what[r], s.scenario+" "+s.target)
	}
	var table [][]string
	for _, r := range order {
		table = append(table, []string{r.provider, r.kernel, r.mode, r.services, strings.Join(what[r], ", "), skippedBecause(r.reason)})
	}
	markdown(b, []string{"provider", "kernel", "mode", "Services", "what", "reason"}, table)
}

// sameVisits reports whether two skips differ in the rung alone, or in its being visited again.
func (s skip) sameVisits(o skip) bool {
	s.services, s.again = o.services, o.again
	return s == o
}
