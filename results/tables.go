// SPDX-License-Identifier: Apache-2.0

package results

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
)

// footnotes number the texts that would burst a table's cells. A text keeps its number
// throughout the report, and stands below the first table that refers to it.
type footnotes struct {
	texts   []string
	printed int   // of texts
	pending []int // referred to since the last print
}

// mark returns the number of text, to be put behind what it is about. It is "" for no text.
func (f *footnotes) mark(text string) string {
	if text == "" {
		return ""
	}
	i := slices.Index(f.texts, text)
	if i < 0 {
		i = len(f.texts)
		f.texts = append(f.texts, text)
	}
	if !slices.Contains(f.pending, i) {
		f.pending = append(f.pending, i)
	}
	return " " + superscript(i+1)
}

// print writes the texts that the table above refers to, and of those that stand above already the number.
func (f *footnotes) print(b *strings.Builder) {
	slices.Sort(f.pending)
	var lines, known []string
	for _, n := range f.pending {
		if n < f.printed {
			known = append(known, superscript(n+1))
		} else {
			lines = append(lines, superscript(n+1)+" "+cell(f.texts[n]))
		}
	}
	if len(known) > 0 {
		lines = slices.Insert(lines, 0, enumerated(known)+": as above")
	}
	if len(lines) > 0 {
		fmt.Fprintf(b, "%s\n\n", strings.Join(lines, "<br>\n"))
	}
	f.printed, f.pending = len(f.texts), nil
}

func superscript(n int) string {
	digits := []rune("⁰¹²³⁴⁵⁶⁷⁸⁹")
	return strings.Map(func(c rune) rune { return digits[c-'0'] }, fmt.Sprint(n))
}

// groupSection prints what is known of one scenario's metric: its picture, its verdicts by target, and its medians at each rung.
func (a *analysis) groupSection(b *strings.Builder, group []key) {
	first := group[0]
	fmt.Fprintf(b, "## %s\n\n", upperFirst(figureWords(first, "")))
	if first.scenario == "programming" && first.metric == a.mainMetric(first) {
		b.WriteString("From the moment when a proxy may see what a rung adds to the Services of the rung before, until the newest of them answers and the rules or maps count them " +
			"all. The modes are programmed one after the other. Each rung is climbed once, so there is no interval and no verdict.\n\n")
	}
	for _, f := range a.figures {
		if f.key.group() == first.group() && f.file != a.headlinePicture(first.place()) {
			fmt.Fprintf(b, "![%s](%s)\n\n", f.title, f.file)
		}
	}
	a.verdictTable(b, group)
	a.rungTable(b, group)
	if first.scenario == "programming" && first.metric == a.mainMetric(first) {
		a.fleetLines(b, first)
	}
}

// fleetLines say what of the programming time no mode answers for.
func (a *analysis) fleetLines(b *strings.Builder, k key) {
	for _, metric := range []string{"fleet-written", "fleet-listed"} {
		k.metric = metric
		at := map[int]float64{} // the same in every mode's record
		for _, s := range a.series[k] {
			for _, n := range s.rungs() {
				at[n] = median(s.values(n))
			}
		}
		var times []string
		for _, n := range slices.Sorted(maps.Keys(at)) {
			times = append(times, fmt.Sprintf("%s at %s", quantity(at[n], k.unit), number(n)))
		}
		if len(times) > 0 {
			fmt.Fprintf(b, "The same for all modes, %s: %s.\n\n", about(metric).words, enumerated(times))
		}
	}
}

// verdictTable prints the verdicts of one metric by target. What was measured once a rung has none.
func (a *analysis) verdictTable(b *strings.Builder, group []key) {
	if !slices.ContainsFunc(group, func(k key) bool { return a.measuredInRounds(k) }) {
		return
	}
	header := []string{"target", "mode", "verdict", "slope per Service (95 %)", "above", "at the smallest rung", "at the largest"}
	floors := a.table.floors()
	for _, f := range floors {
		header = append(header, "÷ "+f.Name)
	}
	var rows [][]string
	for _, k := range group {
		for _, v := range a.of(k) {
			row := append([]string{v.Target, v.Mode, a.verdictCell(v), perService(v.Slope, v.Low, v.High, v.Unit), or(v.FloorMode, "–")}, a.endCells(k, v)...)
			for _, f := range floors {
				text := "–"
				if i := slices.IndexFunc(v.Ratios, func(r Ratio) bool { return r.Floor == f.Name }); i >= 0 {
					text = ratioCell(v.Ratios[i])
				}
				row = append(row, text)
			}
			rows = append(rows, row)
		}
	}
	markdown(b, header, rows)
	a.notes.print(b)
}

// measuredInRounds reports whether any mode has more than one round at k.
func (a *analysis) measuredInRounds(k key) bool {
	for _, s := range a.series[k] {
		if s.rounds() > 1 {
			return true
		}
	}
	return false
}

// verdictCell prints a verdict with its remarks. A mode that was skipped at every rung has the reason for one.
func (a *analysis) verdictCell(v Verdict) string {
	if math.IsNaN(v.AtLargest) {
		rungs, reasons := a.skippedAt(v.key(), v.Mode)
		if len(rungs) == 0 {
			return "no value" + a.notes.mark(v.Note)
		}
		var marks string
		for _, n := range rungs {
			if m := a.notes.mark(skippedBecause(reasons[n])); !strings.Contains(marks+" ", m+" ") {
				marks += m
			}
		}
		return "skipped" + marks
	}
	text := string(v.Model)
	if v.Model == Undecided && v.Grows {
		text = "grows"
	}
	remarks := v.remarks
	if failed := a.failed(v.key(), v.Mode); failed > 0 {
		remarks = append(slices.Clone(remarks), plural(int(failed), "error")+" and time-outs among its operations")
	}
	return text + a.notes.mark(strings.Join(remarks, "; "))
}

// noValue is said of a mode that was visited, and of which no visit counts.
const noValue = "no visit gave a value: see the warnings"

func skippedBecause(reason string) string { return "skipped: " + reason }

// failed counts the operations of mode at k that failed.
func (a *analysis) failed(k key, mode string) int64 {
	var n int64
	for _, e := range a.errors[visit{k.place(), k.scenario, k.target, mode}] {
		n += e[0]
	}
	return n
}

// endCells print the medians at a mode's smallest and largest rung, and what was skipped beyond.
func (a *analysis) endCells(k key, v Verdict) []string {
	var out []string
	for _, end := range []struct {
		n int
		y float64
	}{{v.Smallest, v.AtSmallest}, {v.Largest, v.AtLargest}} {
		if math.IsNaN(end.y) {
			out = append(out, "–")
		} else {
			out = append(out, fmt.Sprintf("%s at %s", quantity(end.y, v.Unit), number(end.n)))
		}
	}
	if math.IsNaN(v.AtLargest) {
		return out
	}
	rungs, reasons := a.skippedAt(k, v.Mode)
	for _, n := range rungs {
		out[1] += fmt.Sprintf("; %s skipped%s", number(n), a.notes.mark(skippedBecause(reasons[n])))
	}
	return out
}

// ratioCell prints a ratio to three digits that mean something.
func ratioCell(r Ratio) string {
	if math.IsNaN(r.Value) {
		return "–"
	}
	text := formatValue(r.Value)
	if math.Abs(r.Value) < 2 {
		text = fmt.Sprintf("%.3f", r.Value)
	}
	if !r.Differs {
		text += " ~"
	}
	return text
}

// visited counts the rounds that mode was visited in at a rung, with or without a value.
func (a *analysis) visited(k key, mode string, services int) int {
	if a.series[k][mode] == nil && k.metric != a.mainMetric(k) {
		return 0 // not every mode has every metric
	}
	return a.table.rounds[visit{k.place(), k.scenario, k.target, mode}][services]
}

// rungTable prints the medians of one metric at each rung.
func (a *analysis) rungTable(b *strings.Builder, group []key) {
	var rungs []int
	for _, k := range group {
		for _, m := range a.modes {
			skipped, _ := a.skippedAt(k, m.Name)
			rungs = append(rungs, append(skipped, a.series[k][m.Name].rungs()...)...)
		}
	}
	slices.Sort(rungs)
	rungs = slices.Compact(rungs)
	header := []string{"mode"}
	if len(group) > 1 {
		header = []string{"target", "mode"}
	}
	for _, n := range rungs {
		header = append(header, number(n))
	}
	var rows [][]string
	rounds := 0
	for _, k := range group {
		for _, m := range a.modes {
			row, any := []string{m.Name}, false
			if len(group) > 1 {
				row = []string{k.target, m.Name}
			}
			_, reasons := a.skippedAt(k, m.Name)
			for _, n := range rungs {
				text := ""
				values := a.series[k][m.Name].values(n)
				visited := a.visited(k, m.Name, n)
				switch {
				case len(values) > 0:
					text, rounds = spread(summarize(values), k.unit), max(rounds, len(values))
					if missing := visited - len(values); missing > 0 {
						text += a.notes.mark(fmt.Sprintf("%s without a value: see the warnings", plural(missing, "round")))
					}
				case visited > 0:
					text = "no value" + a.notes.mark(noValue)
				}
				if reason := reasons[n]; reason != "" {
					text = strings.TrimPrefix(text+"; skipped", "; ") + a.notes.mark(skippedBecause(reason))
				}
				any = any || text != ""
				row = append(row, or(text, "–"))
			}
			if any {
				rows = append(rows, row)
			}
		}
	}
	markdown(b, header, rows)
	a.notes.print(b)
	switch {
	case rounds >= 6:
		b.WriteString("Medians of the rounds with their 95 % interval; of fewer than six rounds, their range.\n\n")
	case rounds > 1:
		b.WriteString("Medians of the rounds with their range.\n\n")
	}
}
