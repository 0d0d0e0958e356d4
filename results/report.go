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

// report returns report.md.
func (a *analysis) report() []byte {
	b := &strings.Builder{}
	a.head(b)
	for _, p := range a.places() {
		if len(a.places()) > 1 {
			fmt.Fprintf(b, "# %s, kernel %s, %s a Service\n\n", p.provider, p.kernel, plural(p.endpoints, "endpoint"))
		}
		a.verdictSection(b, p)
		a.crossoverSection(b, p)
		a.pictureSection(b, p)
		a.rungSections(b, p)
		a.otherVerdicts(b, p)
		a.floorSection(b, p)
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
			for _, v := range s.visits {
				n = max(n, len(v))
			}
		}
	}
	return n
}

// at returns the verdicts of one place that keep says.
func (a *analysis) at(p place, keep func(Verdict, string) bool) []Verdict {
	var out []Verdict
	for _, v := range a.verdicts {
		if (place{v.Provider, v.Kernel, v.Endpoints}) == p && keep(v, a.mainMetric(key{provider: v.Provider, kernel: v.Kernel, endpoints: v.Endpoints, scenario: v.Scenario})) {
			out = append(out, v)
		}
	}
	return out
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

func (a *analysis) verdictSection(b *strings.Builder, p place) {
	b.WriteString("## Verdicts\n\n")
	if len(a.scenarios(p)) == 0 {
		b.WriteString("Nothing was measured; see the skips below.\n\n")
		return
	}
	var floors []string
	for _, f := range a.table.floors() {
		floors = append(floors, f.Name)
	}
	for _, scenario := range a.scenarios(p) {
		verdicts := a.at(p, func(v Verdict, main string) bool { return v.Scenario == scenario && v.Metric == main })
		fmt.Fprintf(b, "### %s\n\n", upperFirst(figureWords(scenario, "", verdicts[0].Metric)))
		header := []string{"mode", "target", "verdict", "slope per Service (95 %)", "smallest rung", "largest rung"}
		for _, f := range floors {
			header = append(header, "÷ "+f)
		}
		var rows [][]string
		for _, v := range verdicts {
			rows = append(rows, a.verdictRow(v, floors))
		}
		markdown(b, append(header, "note"), rows)
		for _, s := range a.sentences(verdicts) {
			fmt.Fprintf(b, "- %s\n", s)
		}
		b.WriteString("\n")
	}
	b.WriteString("The verdict and the slope are of the cost above the mode's floor (see the note), the other figures are medians as measured. ÷ is the ratio at the " +
		"mode's largest rung; ~ means that no difference is claimed (Mann–Whitney p ≥ 0.05, or less apart than the noise floor). " +
		"O(1): a rise beyond the noise floor is excluded; O(1) by AICc: it is not excluded, but no growth law explains the medians better than none does; undecided: the data do not say. The method is described in docs/method.md.\n\n")
}

func (a *analysis) verdictRow(v Verdict, floors []string) []string {
	row := []string{v.Mode, v.Target, string(v.Model), perService(v.Slope, v.Low, v.High, v.Unit)}
	if v.Points == 0 && math.IsNaN(v.AtLargest) {
		row[2] = "–"
	}
	for _, end := range []struct {
		n int
		y float64
	}{{v.Smallest, v.AtSmallest}, {v.Largest, v.AtLargest}} {
		if math.IsNaN(end.y) {
			row = append(row, "–")
		} else {
			row = append(row, fmt.Sprintf("%s at %s", quantity(end.y, v.Unit), number(end.n)))
		}
	}
	for _, f := range floors {
		text := "–"
		for _, r := range v.Ratios {
			if r.Floor == f && !math.IsNaN(r.Value) {
				text = fmt.Sprintf("%.3f", r.Value)
				if !r.Differs {
					text += " ~"
				}
			}
		}
		row = append(row, text)
	}
	note := v.Note
	var failed int64
	for _, n := range a.errors[visit{place{v.Provider, v.Kernel, v.Endpoints}, v.Scenario, v.Target, v.Mode}] {
		failed += n[0]
	}
	if failed > 0 {
		note = strings.TrimPrefix(note+"; "+plural(int(failed), "error"), "; ")
	}
	return append(row, note)
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

func (a *analysis) pictureSection(b *strings.Builder, p place) {
	b.WriteString("## Pictures\n\n")
	several := len(a.places()) > 1
	for _, f := range a.figures {
		if !several || f.place == p {
			fmt.Fprintf(b, "![%s](%s)\n\n", f.title, f.file)
		}
	}
}

// rungSections prints the medians at each rung: of the scenarios' main metrics, then of CPU and memory.
func (a *analysis) rungSections(b *strings.Builder, p place) {
	for _, group := range a.groups() {
		k := group[0]
		if k.place() != p {
			continue
		}
		main := k.metric == a.mainMetric(k)
		if !main && k.scenario != "programming" && !slices.Contains([]string{"cpu", "proxy-cpu", "rss"}, k.metric) {
			continue
		}
		fmt.Fprintf(b, "## %s at each rung\n\n", upperFirst(figureWords(k.scenario, "", k.metric)))
		a.rungTable(b, group)
	}
}

func (a *analysis) rungTable(b *strings.Builder, group []key) {
	var rungs []int
	for _, k := range group {
		for _, s := range a.series[k] {
			rungs = append(rungs, s.rungs()...)
		}
		for _, s := range a.skips {
			if s.place == k.place() && s.scenario == k.scenario && s.target == k.target {
				rungs = append(rungs, s.services)
			}
		}
	}
	slices.Sort(rungs)
	rungs = slices.Compact(rungs)
	header := []string{"mode", "target"}
	for _, n := range rungs {
		header = append(header, number(n))
	}
	var rows [][]string
	for _, k := range group {
		for _, m := range a.modes {
			row, any, before := []string{m.Name, k.target}, false, ""
			for _, n := range rungs {
				values := a.series[k][m.Name].values(n)
				text := ""
				if len(values) > 0 {
					text = spread(summarize(values), k.unit)
				}
				reason := a.skipped(k, m.Name, n)
				switch {
				case reason != "" && reason == before:
					text = strings.TrimPrefix(text+"; skipped", "; ")
				case reason != "":
					text = strings.TrimPrefix(text+"; skipped: "+reason, "; ")
				}
				before = reason
				any = any || text != ""
				row = append(row, or(text, "–"))
			}
			if any {
				rows = append(rows, row)
			}
		}
	}
	markdown(b, header, rows)
	b.WriteString("Medians of the rounds with their 95 % interval (the range, for two to five rounds).\n\n")
}

// skipped returns why mode has no values at a rung, or "".
func (a *analysis) skipped(k key, mode string, services int) string {
	for _, s := range a.skips {
		if s.place == k.place() && s.scenario == k.scenario && s.target == k.target && s.mode == mode && s.services == services {
			return s.reason
		}
	}
	return ""
}

// otherVerdicts prints the verdicts that the first table leaves out.
func (a *analysis) otherVerdicts(b *strings.Builder, p place) {
	verdicts := a.at(p, func(v Verdict, main string) bool { return v.Metric != main && v.Points > 0 })
	if len(verdicts) == 0 {
		return
	}
	b.WriteString("## Verdicts of the other metrics\n\n")
	var rows [][]string
	for _, v := range verdicts {
		rows = append(rows, []string{v.Scenario, v.Metric, v.Mode, v.Target, string(v.Model), perService(v.Slope, v.Low, v.High, v.Unit),
			quantity(v.AtSmallest, v.Unit), fmt.Sprintf("%s at %s", quantity(v.AtLargest, v.Unit), number(v.Largest)), v.Note})
	}
	markdown(b, []string{"scenario", "metric", "mode", "target", "verdict", "slope per Service (95 %)", "smallest rung", "largest rung", "note"}, rows)
}

func (a *analysis) floorSection(b *strings.Builder, p place) {
	b.WriteString("## Noise floor\n\n")
	var rows [][]string
	for _, f := range a.floors {
		if (place{f.Provider, f.Kernel, f.Endpoints}) != p {
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

func (a *analysis) driftSection(b *strings.Builder, p place) {
	var warned, calm int
	var lines []string
	for _, d := range a.drifts {
		if d.place() != p {
			continue
		}
		switch {
		case d.beyond:
			warned++
			lines = append(lines, fmt.Sprintf("**Warning:** %s, %s, %s %s: %s at first, %s at the end; the noise floor is %s.", d.scenario, d.mode, d.target, d.metric,
				quantity(d.first, d.unit), quantity(d.again, d.unit), quantity(d.floor, d.unit)))
		case !d.known && d.metric == a.mainMetric(d.key):
			lines = append(lines, fmt.Sprintf("%s, %s, %s %s: %s at first, %s at the end.", upperFirst(d.scenario), d.mode, d.target, d.metric, quantity(d.first, d.unit), quantity(d.again, d.unit)))
		case d.known:
			calm++
		}
	}
	if len(lines) == 0 && calm == 0 {
		return
	}
	b.WriteString("## The smallest rung again\n\n")
	if warned == 0 && calm > 0 {
		fmt.Fprintf(b, "All %d medians came back within the noise floor when the smallest rung was visited again at the end.\n\n", calm)
	}
	for _, l := range lines {
		fmt.Fprintf(b, "- %s\n", l)
	}
	if len(lines) > 0 {
		b.WriteString("\n")
	}
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

func (a *analysis) warningSection(b *strings.Builder) {
	b.WriteString("## Warnings\n\n")
	count, order := map[string][]string{}, []string{}
	for _, r := range a.run.Records {
		for _, w := range r.Warnings {
			if count[w] == nil {
				order = append(order, w)
			}
			at := fmt.Sprintf("%s %s %s at %s, round %d", r.Scenario, r.Mode, r.Target, number(r.Services), r.Round)
			if r.Again {
				at += " (again)"
			}
			count[w] = append(count[w], at)
		}
	}
	if len(order) == 0 {
		b.WriteString("None.\n\n")
		return
	}
	for _, w := range order {
		fmt.Fprintf(b, "- %s: %s\n", cell(w), cell(strings.Join(count[w], "; ")))
	}
	b.WriteString("\n")
}

func (a *analysis) skipSection(b *strings.Builder) {
	b.WriteString("## Skipped\n\n")
	if len(a.skips) == 0 {
		b.WriteString("Nothing.\n\n")
		return
	}
	rows := map[skip][]string{}
	var order []skip
	for _, s := range a.skips {
		n := s.services
		s.services = 0 // one row for all rungs of one reason
		if rows[s] == nil {
			order = append(order, s)
		}
		rows[s] = append(rows[s], number(n))
	}
	var table [][]string
	for _, s := range order {
		table = append(table, []string{s.provider, s.kernel, s.scenario, s.mode, s.target, strings.Join(rows[s], "; "), "skipped: " + s.reason})
	}
	markdown(b, []string{"provider", "kernel", "scenario", "mode", "target", "Services", "reason"}, table)
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
