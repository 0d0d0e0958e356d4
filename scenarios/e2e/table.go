// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/csv"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// The files of the results, in Plan.Out.
const (
	TableFile = "e2e.csv"
	PageFile  = "e2e.md"
)

// a row is one spec in one pass.
type row struct {
	Spec
	pass
}

// write writes the table and the page of what has ended so far.
func (s *suite) write() error {
	var rows []row
	var batches []passBatch
	for _, mode := range s.plan.Modes {
		for _, family := range s.plan.Families {
			for _, p := range s.passes(mode, family) {
				ended, err := s.ended(p)
				if err != nil {
					return err
				}
				if len(ended) == 0 {
					continue
				}
				records, err := readLines[batch](filepath.Join(s.dir(p), batchesFile))
				if err != nil {
					return err
				}
				for _, r := range records {
					batches = append(batches, passBatch{r, p})
				}
				for _, e := range slices.Concat(ended, s.left) {
					if p.belongs(e.Name) {
						rows = append(rows, row{e, p})
					}
				}
			}
		}
	}
	slices.SortStableFunc(rows, func(a, b row) int { return strings.Compare(a.Name, b.Name) })
	f, err := os.Create(filepath.Join(s.plan.Out, TableFile))
	if err != nil {
		return err
	}
	defer f.Close()
	w := csv.NewWriter(f)
	w.Write([]string{"spec", "mode", "family", "run", "outcome", "seconds", "reason"})
	for _, r := range rows {
		w.Write([]string{r.Name, r.mode, string(r.family), strconv.Itoa(r.run), string(r.Outcome), strconv.FormatFloat(r.Seconds, 'f', 1, 64), oneLine(r.Reason)})
	}
	w.Flush()
	if err := w.Error(); err != nil {
		return fmt.Errorf("write %s: %w", TableFile, err)
	}
	return os.WriteFile(filepath.Join(s.plan.Out, PageFile), []byte(s.page(rows, batches)), 0o644)
}

// a passBatch is a batch of a pass.
type passBatch struct {
	batch
	pass
}

// A cell is what came of a spec in a mode's clusters of one family, in all runs.
type cell struct {
	passed, ended int
	why           string
}

func (c *cell) String() string {
	switch {
	case c == nil:
		return ""
	case c.ended == 0:
		return "skipped"
	case c.passed == c.ended:
		return "passed"
	case c.passed == 0:
		return "**failed**"
	}
	return fmt.Sprintf("**%d of %d**", c.passed, c.ended)
}

// about says of all batches with what and on what they were run, and when.
func about(batches []passBatch) string {
	var all []string
	var first, last time.Time
	for _, b := range batches {
		if !slices.Contains(all, b.About) {
			all = append(all, b.About)
		}
		if first.IsZero() || b.Began.Before(first) {
			first = b.Began
		}
		if end := b.Began.Add(time.Duration(b.Seconds * float64(time.Second))); end.After(last) {
			last = end
		}
	}
	const minute = "2006-01-02 15:04"
	return fmt.Sprintf("Kubernetes' own specs in kind clusters, from %s to %s UTC:\n- %s\n", first.UTC().Format(minute), last.UTC().Format(minute), strings.Join(all, "\n- "))
}

// page are the tables side by side, as Markdown: for each family how often each spec passed in each mode, after a summary.
func (s *suite) page(rows []row, batches []passBatch) string {
	modes, families := s.plan.Modes, s.plan.Families
	type key struct {
		name, mode string
		family     clusters.IPFamily
	}
	cells := map[key]*cell{}
	type sum struct {
		outcomes map[Outcome]int
		minutes  float64
	}
	sums := map[key]*sum{} // without a name
	for _, r := range rows {
		k := key{r.Name, r.mode, r.family}
		c := cells[k]
		if c == nil {
			c = new(cell)
			cells[k] = c
		}
		if r.Outcome != Skipped {
			c.ended++
		}
		if r.Outcome == Passed {
			c.passed++
		} else {
			c.why = oneLine(r.Reason)
		}
		k.name = ""
		if sums[k] == nil {
			sums[k] = &sum{outcomes: map[Outcome]int{}}
		}
		sums[k].outcomes[r.Outcome]++
	}
	for _, r := range batches {
		sums[key{"", r.mode, r.family}].minutes += r.Seconds / 60
	}
	var b strings.Builder
	b.WriteString("# Kubernetes' own tests of Services, mode by mode\n\n" + about(batches) + "\n")
	b.WriteString("| | mode | passed | failed | skipped | minutes, without the cluster's making |\n|---|---|---|---|---|---|\n")
	for _, family := range families {
		for _, mode := range modes {
			if s := sums[key{"", mode, family}]; s != nil {
				fmt.Fprintf(&b, "| %s | %s | %d | %d | %d | %.1f |\n", title(family), mode, s.outcomes[Passed], s.outcomes[Failed], s.outcomes[Skipped], s.minutes)
			}
		}
	}
	for _, family := range families {
		var here []string
		for _, r := range rows {
			if r.family == family {
				here = append(here, r.Name) // sorted, as rows are
			}
		}
		if len(here) == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n## %s\n\n| spec | %s | |\n|---%s|---|\n", title(family), strings.Join(modes, " | "), strings.Repeat("|---", len(modes)))
		for _, name := range slices.Compact(here) {
			var words, reasons []string
			for _, mode := range modes {
				c := cells[key{name, mode, family}]
				words = append(words, c.String())
				if c != nil && c.why != "" && !slices.Contains(reasons, c.why) {
					reasons = append(reasons, c.why)
				}
			}
			fmt.Fprintf(&b, "| %s | %s | %s |\n", escape(name), strings.Join(words, " | "), escape(strings.Join(reasons, "; ")))
		}
	}
	return b.String()
}

// title is a family as people write it.
func title(family clusters.IPFamily) string {
	switch family {
	case clusters.IPv4:
		return "IPv4"
	case clusters.IPv6:
		return "IPv6"
	}
	return "dual-stack"
}

// escape has text stay in its cell.
func escape(text string) string { return strings.ReplaceAll(text, "|", `\|`) }
