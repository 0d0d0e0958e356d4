// SPDX-License-Identifier: Apache-2.0

package results

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
)

// report returns report.md: the answer first, then each scenario and metric by itself, then what makes it doubtful, then how to make it again.
func (a *analysis) report() []byte {
	b := &strings.Builder{}
	a.head(b)
	for _, p := range a.places() {
		if len(a.places()) > 1 {
			fmt.Fprintf(b, "# %s, kernel %s, %s a Service\n\n", p.provider, p.kernel, plural(p.endpoints, "endpoint"))
		}
		a.answer(b, p)
		for _, group := range a.groups() {
			if group[0].place() == p && about(group[0].metric).tabled {
				a.groupSection(b, group)
			}
		}
		a.crossoverSection(b, p)
		a.floorSection(b, p)
		a.quietSection(b, p)
		a.driftSection(b, p)
	}
	a.errorSection(b)
	a.warningSection(b)
	a.skipSection(b)
	a.environmentSection(b)
	return []byte(b.String())
}

func (a *analysis) head(b *strings.Builder) {
	e := a.env
	fmt.Fprintf(b, "# What a Service costs: %s\n\n", or(cell(e.Run), "a run"))
	var ran []string
	if !e.Start.IsZero() {
		ran = append(ran, e.Start.UTC().Format("2006-01-02 15:04 MST"))
	}
	if e.CPU != "" {
		ran = append(ran, fmt.Sprintf("%d × %s", e.NumCPU, e.CPU))
	}
	if e.Kernel != "" {
		ran = append(ran, "kernel "+e.Kernel)
	}
	ran = append(ran, plural(a.rounds(), "round"), fmt.Sprintf("seed %d", e.Seed))
	fmt.Fprintf(b, "%s.\n\n", strings.Join(ran, " · "))
	if e.End.IsZero() {
		b.WriteString("**This run did not finish.** What follows is what it had measured when it ended.\n\n")
	}
	if a.repeated > 0 {
		fmt.Fprintf(b, "**Warning:** %s stand twice in the records, as when a visit was repeated; the later one counts.\n\n", plural(a.repeated, "value"))
	}
	for _, w := range a.run.Warnings {
		fmt.Fprintf(b, "**Warning:** %s\n\n", cell(w))
	}
}

// rounds returns the most rounds that any rung has.
func (a *analysis) rounds() int {
	n := 0
	for _, modes := range a.series {
		for _, s := range modes {
			n = max(n, s.rounds())
		}
	}
	return n
}

// headline returns the key that answers the question: new connections to the end of the chain, or the first thing that was measured.
func (a *analysis) headline(p place) (headline key, ok bool) {
	for _, k := range a.keys {
		if k.place() != p || k.scenario == "programming" || k.metric != a.mainMetric(k) {
			continue
		}
		if !ok || k.scenario == headline.scenario && k.target == "tail" {
			headline, ok = k, true
		}
	}
	return headline, ok
}

// answer prints what the run was made for: one table with a row for each mode, what it says in words, and its picture.
func (a *analysis) answer(b *strings.Builder, p place) {
	k, ok := a.headline(p)
	if !ok {
		b.WriteString("Nothing was measured; see the skips below.\n\n")
		return
	}
	fmt.Fprintf(b, "**%s, %s, by number of Services**\n\n", upperFirst(figureWords(k, k.target)), about(k.metric).words)
	var rows [][]string
	floor := math.NaN()
	for _, v := range a.of(k) {
		rows = append(rows, a.answerRow(v))
		if m := a.env.mode(v.Mode); m.Floor != "" && !math.IsNaN(v.Floor) {
			floor = v.Floor
		}
	}
	markdown(b, []string{"mode", "verdict", "slope per Service (95 %)", "at the smallest rung", "at the largest", "÷ its floor", "÷ the other floor"}, rows)
	a.notes.print(b)
	if !math.IsNaN(floor) {
		fmt.Fprintf(b, "The noise floor is %s: 95 %% of the differences between two nodes of one mode are smaller. ", quantity(floor, k.unit))
	}
	b.WriteString("Verdict and slope are of the cost above the mode's floor; the rest are medians as measured. ÷ is the median of the rounds' ratios at the mode's largest rung; " +
		"~ says that no difference is claimed.\n\n")
	for _, scenario := range a.scenarios(p) {
		verdicts := a.at(p, func(v Verdict) bool { return v.Scenario == scenario && v.Metric == a.mainMetric(v.key()) })
		for _, s := range a.sentences(verdicts) {
			fmt.Fprintf(b, "- %s\n", s)
		}
	}
	b.WriteString("\n")
	for _, f := range a.figures {
		if f.file == a.headlinePicture(p) {
			fmt.Fprintf(b, "![%s](%s)\n\n", f.title, f.file)
		}
	}
}

// headlinePicture returns the file of the picture that the report begins with: of the headline's target alone where there is one.
func (a *analysis) headlinePicture(p place) string {
	k, _ := a.headline(p)
	file := ""
	for _, f := range a.figures {
		if f.key == k || f.key == k.group() && file == "" {
			file = f.file
		}
	}
	return file
}

func (a *analysis) answerRow(v Verdict) []string {
	k := v.key()
	row := []string{v.Mode, "a floor", "–"} // its own drift is for the table by target
	if !a.isFloor(a.env.mode(v.Mode)) || v.Points == 0 {
		row = []string{v.Mode, a.verdictCell(v), perService(v.Slope, v.Low, v.High, v.Unit)}
	}
	row = append(row, a.endCells(k, v)...)
	own, other := "–", []string{}
	for _, r := range v.Ratios {
		switch text := ratioCell(r); {
		case text == "–":
		case r.Floor == or(v.FloorMode, a.env.mode(v.Mode).Floor):
			own = fmt.Sprintf("%s (%s)", text, r.Floor)
		default:
			other = append(other, fmt.Sprintf("%s (%s)", text, r.Floor))
		}
	}
	return append(row, own, or(strings.Join(other, ", "), "–"))
}

// at returns the verdicts of one place that keep says.
func (a *analysis) at(p place, keep func(Verdict) bool) []Verdict {
	var out []Verdict
	for _, v := range a.verdicts {
		if v.key().place() == p && keep(v) {
			out = append(out, v)
		}
	}
	return out
}

// of returns the verdicts of one key.
func (a *analysis) of(k key) []Verdict {
	return a.at(k.place(), func(v Verdict) bool { return v.key() == k })
}

func (a *analysis) scenarios(p place) []string {
	var out []string
	for _, k := range a.keys {
		if k.place() == p && !slices.Contains(out, k.scenario) {
			out = append(out, k.scenario)
		}
	}
	return out
}

func (a *analysis) crossoverSection(b *strings.Builder, p place) {
	var lines []string
	for _, c := range a.crossovers {
		here := place{c.Provider, c.Kernel, c.Endpoints} == p
		main := a.mainMetric(key{provider: c.Provider, kernel: c.Kernel, endpoints: c.Endpoints, scenario: c.Scenario}) == c.Metric
		if here && main && !math.IsNaN(c.Services) {
			lines = append(lines, crossoverSentence(c))
		}
	}
	b.WriteString("## Crossovers\n\n")
	if len(lines) == 0 {
		b.WriteString("No mode is cheaper than another at one rung and dearer at a later one.\n\n")
		return
	}
	for _, l := range lines {
		fmt.Fprintf(b, "- %s\n", l)
	}
	b.WriteString("\n")
}

func (a *analysis) environmentSection(b *strings.Builder) {
	e := a.env
	b.WriteString("## Environment\n\n")
	var rows [][]string
	add := func(k, v string) {
		if v != "" {
			rows = append(rows, []string{k, v})
		}
	}
	commit := e.Commit
	if e.Dirty {
		commit += " with local changes"
	}
	add("plimsoll", commit)
	add("kernel", e.Kernel)
	add("CPU", fmt.Sprintf("%d × %s", e.NumCPU, e.CPU))
	if e.MemoryBytes > 0 {
		add("memory", quantity(float64(e.MemoryBytes), "bytes"))
	}
	add("platform", strings.Trim(e.GOOS+"/"+e.GOARCH, "/"))
	add("Go", e.Go)
	if !e.Start.IsZero() {
		add("start", e.Start.UTC().Format(time.RFC3339))
	}
	if !e.End.IsZero() {
		add("end", e.End.UTC().Format(time.RFC3339))
	}
	var ladder []string
	for _, n := range e.Plan.Services {
		ladder = append(ladder, number(n))
	}
	add("plan", fmt.Sprintf("%s at %s Services of %s, %s, %s operations/s for CPU", strings.Join(e.Plan.Scenarios, ", "), strings.Join(ladder, "; "),
		plural(e.Plan.Endpoints, "endpoint"), plural(e.Plan.Rounds, "round"), formatValue(e.Plan.Rate)))
	for _, m := range e.Modes {
		about := m.Doc
		switch {
		case m.Twin != "":
			about += " (A/A twin of " + m.Twin + ")"
		case m.Floor != "":
			about += " (held against " + m.Floor + ")"
		}
		add("mode "+m.Name, about)
	}
	for _, m := range []struct {
		prefix string
		values map[string]string
	}{{"version of ", e.Versions}, {"setting ", e.Settings}, {"sysctl ", e.Sysctls}, {"", e.Extra}} {
		for _, k := range slices.Sorted(maps.Keys(m.values)) {
			add(m.prefix+k, m.values[k])
		}
	}
	markdown(b, []string{"what", "value"}, rows)
	b.WriteString("## To reproduce\n\n")
	if len(e.Command) > 0 {
		fmt.Fprintf(b, "```\n%s\n```\n\n", strings.Join(quoted(e.Command), " "))
	}
	fmt.Fprintf(b, "`plimsoll report DIR` renders this page again from %s and %s; `benchstat -col /mode %s` reads the records.\n", RecordsFile, EnvironmentFile, RecordsFile)
}

// quoted puts quotes around the arguments that a shell would split.
func quoted(argv []string) []string {
	out := slices.Clone(argv)
	for i, arg := range out {
		if arg == "" || strings.ContainsAny(arg, " \t\n\"'$`\\*?;&|<>(){}[]#~!") {
			out[i] = "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
		}
	}
	return out
}
