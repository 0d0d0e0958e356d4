// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/csv"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// The files of the results, in Plan.Out.
const (
	TableFile = "e2e.csv"
	PageFile  = "e2e.md"
)

// a row is one spec in one mode's run.
type row struct {
	Spec
	mode string
	run  int
}

// write writes the table and the page of what has ended so far.
func (s *suite) write() error {
	var rows []row
	for _, mode := range s.plan.Modes {
		for run := 1; run <= s.plan.Runs; run++ {
			ended, err := readEnded(filepath.Join(s.dir(mode, run), endedFile))
			if err != nil {
				return err
			}
			if len(ended) == 0 {
				continue
			}
			for _, e := range slices.Concat(ended, s.left) {
				rows = append(rows, row{e, mode, run})
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
	w.Write([]string{"spec", "mode", "run", "outcome", "seconds", "reason"})
	for _, r := range rows {
		w.Write([]string{r.Name, r.mode, strconv.Itoa(r.run), string(r.Outcome), strconv.FormatFloat(r.Seconds, 'f', 1, 64), oneLine(r.Reason)})
	}
	w.Flush()
	if err := w.Error(); err != nil {
		return fmt.Errorf("write %s: %w", TableFile, err)
	}
	return os.WriteFile(filepath.Join(s.plan.Out, PageFile), []byte(page(s.plan.Modes, rows)), 0o644)
}

// page is the table side by side, as Markdown: how often each spec passed in each mode.
func page(modes []string, rows []row) string {
	type cell struct {
		passed, ended int
		why           string
	}
	specs := map[string]map[string]*cell{}
	for _, r := range rows {
		if specs[r.Name] == nil {
			specs[r.Name] = map[string]*cell{}
		}
		c := specs[r.Name][r.mode]
		if c == nil {
			c = new(cell)
			specs[r.Name][r.mode] = c
		}
		switch r.Outcome {
		case Passed:
			c.passed++
			c.ended++
		case Failed:
			c.ended++
			c.why = oneLine(r.Reason)
		case Skipped:
			c.why = oneLine(r.Reason)
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "| spec | %s | |\n|---%s|---|\n", strings.Join(modes, " | "), strings.Repeat("|---", len(modes)))
	for _, name := range slices.Sorted(maps.Keys(specs)) {
		var words []string
		why := ""
		for _, mode := range modes {
			c := specs[name][mode]
			switch {
			case c == nil:
				words = append(words, "")
				continue
			case c.ended == 0:
				words = append(words, "skipped")
			case c.passed == c.ended:
				words = append(words, "passed")
			case c.passed == 0:
				words = append(words, "**failed**")
			default:
				words = append(words, fmt.Sprintf("**%d of %d**", c.passed, c.ended))
			}
			if c.why != "" {
				why = c.why
			}
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", escape(name), strings.Join(words, " | "), escape(why))
	}
	return b.String()
}

// escape has text stay in its cell.
func escape(text string) string { return strings.ReplaceAll(text, "|", `\|`) }
