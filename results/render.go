// SPDX-License-Identifier: Apache-2.0

package results

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
)

// Render writes results.csv, verdicts.csv, crossovers.csv, the pictures and report.md into dir, from the records alone: the same
// records give the same bytes. Each file is replaced whole or left as it was; report.md comes last, so that what it shows exists. Pictures of the
// report that it replaces go when the new one has no such picture; no other file is removed.
func (r *Run) Render(dir string) error {
	t := newTable(r)
	a := analysis{run: r, table: t, verdicts: t.verdicts(), crossovers: t.crossovers(), floors: t.noiseFloors(), drifts: t.drifts()}
	a.figures = a.plan()

	type file struct {
		name    string
		content []byte
	}
	files := []file{
		{ResultsFile, t.resultsCSV(r.Records)},
		{VerdictsFile, verdictsCSV(a.verdicts)},
		{CrossoversFile, crossoversCSV(a.crossovers)},
	}
	for _, f := range a.figures {
		png, err := f.png()
		if err != nil {
			return fmt.Errorf("draw %s: %w", f.file, err)
		}
		files = append(files, file{f.file, png})
	}
	files = append(files, file{ReportFile, a.report()})
	if err := MakeDir(dir); err != nil {
		return fmt.Errorf("render: %w", err)
	}
	former, err := shownPictures(filepath.Join(dir, ReportFile))
	if err != nil {
		return fmt.Errorf("render: %w", err)
	}
	for _, f := range files {
		if err := WriteFile(filepath.Join(dir, f.name), f.content); err != nil {
			return err
		}
	}
	for _, name := range former {
		if slices.ContainsFunc(files, func(f file) bool { return f.name == name }) {
			continue
		}
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove a picture that the report no longer shows: %w", err)
		}
	}
	return nil
}

// pictureLine is how a report shows a picture. Its caption and the letters of its name (see fileName) are the renderer's own,
// so that a picture which somebody wrote into a report by hand is none of them.
var pictureLine = regexp.MustCompile(`(?m)^!\[[^]\n]* by number of Services \([^]\n]*\)\]\(([a-z][A-Za-z0-9._-]*\.png)\)$`)

// shownPictures returns the files of the pictures that a report shows, none where there is no report.
func shownPictures(report string) ([]string, error) {
	text, err := os.ReadFile(report)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, match := range pictureLine.FindAllSubmatch(text, -1) {
		names = append(names, string(match[1]))
	}
	return names, nil
}

// analysis is all that the report and the pictures draw on.
type analysis struct {
	*table
	run        *Run
	verdicts   []Verdict
	crossovers []Crossover
	floors     []NoiseFloor
	drifts     []drift
	figures    []figure
	notes      footnotes
}
