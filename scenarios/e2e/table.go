// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/dataplane"
	"github.com/plimsoll-bench/plimsoll/results"
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

// write writes the table and the page of what has ended so far in Plan.Out, in this run and in those before it.
func (s *suite) write() error {
	var rows []row
	var batches []passBatch
	for _, mode := range dataplane.Modes {
		for _, family := range clusters.IPFamilies() {
			r, b, err := s.read(mode.Name(), family)
			if err != nil {
				return err
			}
			rows, batches = append(rows, r...), append(batches, b...)
		}
	}
	slices.SortStableFunc(rows, func(a, b row) int { return strings.Compare(a.Name, b.Name) })
	var b bytes.Buffer
	w := csv.NewWriter(&b)
	w.Write([]string{"spec", "mode", "family", "run", "outcome", "seconds", "reason"})
	for _, r := range rows {
		w.Write([]string{r.Name, r.mode, string(r.family), strconv.Itoa(r.run), string(r.Outcome), strconv.FormatFloat(r.Seconds, 'f', 1, 64), oneLine(r.Reason)})
	}
	w.Flush()
	if err := w.Error(); err != nil {
		return err
	}
	return errors.Join(
		results.WriteFile(filepath.Join(s.plan.Out, TableFile), b.Bytes()),
		results.WriteFile(filepath.Join(s.plan.Out, PageFile), []byte(page(rows, batches))),
	)
}

// read reads what has ended in a mode's clusters of a family, and what was left: in all passes, of which none has something where the one before it has nothing.
func (s *suite) read(mode string, family clusters.IPFamily) (rows []row, batches []passBatch, err error) {
	for p := (pass{mode, family, 1}); ; p.run++ {
		ended, err := s.ended(p)
		if err != nil {
			return nil, nil, err
		}
		left, err := s.leftIn(p)
		if err != nil || len(ended)+len(left) == 0 {
			return rows, batches, err
		}
		for _, e := range ended {
			rows = append(rows, row{e, p})
		}
		for _, l := range left {
			// One that has ended was run by a command before, where it could be.
			if !slices.ContainsFunc(ended, func(e Spec) bool { return e.Name == l.Name }) {
				rows = append(rows, row{l, p})
			}
		}
		records, err := readLines[batch](filepath.Join(s.dir(p), batchesFile))
		if err != nil {
			return nil, nil, err
		}
		for _, r := range records {
			batches = append(batches, passBatch{r, p})
		}
	}
}

// a passBatch is a batch of a pass.
type passBatch struct {
	batch
	pass
}

// A cell is what came of a spec in a mode's clusters of one family, in all runs.
type cell struct {
	passed, ended   int
	failed, skipped string // why
}

// outcome is passed where it was each time.
func (c *cell) outcome() Outcome {
	switch {
	case c.ended == 0:
		return Skipped
	case c.passed == c.ended:
		return Passed
	}
	return Failed
}

// why is the reason where the outcome wants one.
func (c *cell) why() string {
	if c.outcome() == Skipped {
		return c.skipped
	}
	return c.failed
}

func (c *cell) String() string {
	switch {
	case c == nil:
		return ""
	case c.outcome() != Failed:
		return string(c.outcome())
	case c.passed == 0:
		return "**failed**"
	}
	return fmt.Sprintf("**%d of %d**", c.passed, c.ended)
}

// A column is what came of all specs in a mode's clusters of one family.
type column struct {
	cells   map[string]*cell // by the specs' names
	runs    int
	minutes float64
}

// a columnKey is what a column is of.
type columnKey struct {
	mode   string
	family clusters.IPFamily
}

// columns sums up rows and batches.
func columns(rows []row, batches []passBatch) map[columnKey]*column {
	all := map[columnKey]*column{}
	for _, r := range rows {
		col := all[columnKey{r.mode, r.family}]
		if col == nil {
			col = &column{cells: map[string]*cell{}}
			all[columnKey{r.mode, r.family}] = col
		}
		c := col.cells[r.Name]
		if c == nil {
			c = new(cell)
			col.cells[r.Name] = c
		}
		switch r.Outcome {
		case Passed:
			c.passed++
			c.ended++
		case Failed:
			c.failed = oneLine(r.Reason)
			c.ended++
		case Skipped:
			c.skipped = oneLine(r.Reason)
		}
	}
	for _, b := range batches {
		col := all[columnKey{b.mode, b.family}]
		col.runs = max(col.runs, b.run)
		col.minutes += b.Seconds / 60
	}
	return all
}

// about says of all batches with what and on what they were run, and when.
func about(batches []passBatch) string {
	if len(batches) == 0 {
		return "Of Kubernetes' own specs none has been run.\n"
	}
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

// page are the tables side by side, as Markdown: for each family how often each spec passed in each mode, after a summary. Modes without a run
// are in the summary alone, and below it why.
func page(rows []row, batches []passBatch) string {
	all := columns(rows, batches)
	var named, modes, refusals []string
	for _, mode := range dataplane.Modes {
		name := mode.Name()
		first := slices.IndexFunc(rows, func(r row) bool { return r.mode == name && cannot(r.Name) == "" })
		if first < 0 {
			continue
		}
		named = append(named, name)
		if slices.ContainsFunc(rows, func(r row) bool { return r.mode == name && r.Outcome != Skipped }) ||
			slices.ContainsFunc(batches, func(b passBatch) bool { return b.mode == name }) {
			modes = append(modes, name)
		} else {
			refusals = append(refusals, "- "+rows[first].Reason+"\n")
		}
	}
	var b strings.Builder
	b.WriteString("# Kubernetes' own tests of Services, mode by mode\n\n" + about(batches) + "\n")
	b.WriteString("| | mode | runs | specs passed each time | failed | skipped | minutes a run, without the cluster's making |\n|---|---|---|---|---|---|---|\n")
	for _, family := range clusters.IPFamilies() {
		for _, mode := range named {
			col := all[columnKey{mode, family}]
			if col == nil {
				continue
			}
			outcomes := map[Outcome]int{}
			for _, c := range col.cells {
				outcomes[c.outcome()]++
			}
			minutes := ""
			if col.runs > 0 {
				minutes = fmt.Sprintf("%.1f", col.minutes/float64(col.runs))
			}
			fmt.Fprintf(&b, "| %s | %s | %d | %d | %d | %d | %s |\n", title(family), mode, col.runs, outcomes[Passed], outcomes[Failed], outcomes[Skipped], minutes)
		}
	}
	if len(refusals) > 0 {
		b.WriteString("\nSkipped with all specs:\n" + strings.Join(refusals, ""))
	}
	for _, family := range clusters.IPFamilies() {
		var here []string
		for _, r := range rows {
			if r.family == family && slices.Contains(modes, r.mode) {
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
				var c *cell
				if col := all[columnKey{mode, family}]; col != nil {
					c = col.cells[name]
				}
				words = append(words, c.String())
				if c != nil && c.why() != "" && !slices.Contains(reasons, c.why()) {
					reasons = append(reasons, c.why())
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
