// SPDX-License-Identifier: Apache-2.0

package results

import (
	"bytes"
	"encoding/csv"
	"math"
	"strconv"
	"strings"
)

// resultsCSV returns every record in long form, one value a row, in the order of measurement.
// A skip has an empty value and its reason in the note.
func (t *table) resultsCSV(records []Record) []byte {
	rows := [][]string{{"provider", "kernel", "mode", "scenario", "target", "services", "endpoints", "round", "metric", "unit", "value", "count", "errors", "note"}}
	for _, r := range records {
		row := func(metric, unit, value string) {
			rows = append(rows, []string{r.Provider, r.Kernel, r.Mode, r.Scenario, r.Target, strconv.Itoa(r.Services), strconv.Itoa(r.Endpoints),
				strconv.Itoa(r.Round), metric, unit, value, strconv.FormatInt(r.Count, 10), strconv.FormatInt(r.Errors, 10), r.note()})
		}
		if len(r.Values) == 0 {
			row("", "", "")
		}
		for _, v := range r.Values {
			row(v.Metric, v.Unit, exact(v.Value))
		}
	}
	return encodeCSV(rows)
}

// note is what the CSV says about a record beside its values.
func (r *Record) note() string {
	var notes []string
	if r.Skipped != "" {
		notes = append(notes, "skipped: "+r.Skipped)
	}
	if r.Again {
		notes = append(notes, "again: the smallest rung at the end")
	}
	return strings.Join(append(notes, r.Warnings...), "; ")
}

func verdictsCSV(verdicts []Verdict) []byte {
	rows := [][]string{{"provider", "kernel", "scenario", "target", "metric", "unit", "mode", "model", "slope_per_service", "slope_low", "slope_high", "floor", "points", "note"}}
	for _, v := range verdicts {
		rows = append(rows, []string{v.Provider, v.Kernel, v.Scenario, v.Target, v.Metric, v.Unit, v.Mode, string(v.Model),
			rounded(v.Slope), rounded(v.Low), rounded(v.High), rounded(v.Floor), strconv.Itoa(v.Points), v.Note})
	}
	return encodeCSV(rows)
}

func crossoversCSV(crossovers []Crossover) []byte {
	rows := [][]string{{"provider", "kernel", "scenario", "target", "metric", "unit", "mode_a", "mode_b", "services", "services_low", "services_high"}}
	for _, c := range crossovers {
		rows = append(rows, []string{c.Provider, c.Kernel, c.Scenario, c.Target, c.Metric, c.Unit, c.ModeA, c.ModeB,
			whole(c.Services), whole(c.Low), whole(c.High)})
	}
	return encodeCSV(rows)
}

func encodeCSV(rows [][]string) []byte {
	var b bytes.Buffer
	w := csv.NewWriter(&b)
	// A bytes.Buffer takes all that is written.
	_ = w.WriteAll(rows)
	return b.Bytes()
}

func exact(x float64) string { return strconv.FormatFloat(x, 'f', -1, 64) }

// rounded prints six digits, and nothing for what is not known.
func rounded(x float64) string {
	if math.IsNaN(x) || math.IsInf(x, 0) {
		return ""
	}
	return strconv.FormatFloat(x, 'g', 6, 64)
}

// whole prints a number of Services, and nothing for what is not known or lies beyond the ladder.
func whole(x float64) string {
	if math.IsNaN(x) || math.IsInf(x, 0) {
		return ""
	}
	return strconv.FormatFloat(math.Round(x), 'f', 0, 64)
}
